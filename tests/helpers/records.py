"""Records of runs without measurements, and a value derived from a record."""

from __future__ import annotations

from typing import Any

from peftbench.record import Device, Outcome, RunRecord


def minimal_record(**values: Any) -> RunRecord:
    """Return a record with only the required keys; ``values`` replace or add some."""
    required = {
        "name": "run",
        "started_at": "2026-07-11T00:00:00+00:00",
        "recipe": {
            "name": "run",
            "method": {"kind": "lora"},
            "train": {"seed": 0, "global_batch_size": 4, "precision": "fp32"},
            "data": {"seed": 0, "max_length": 8, "label_padding": False},
        },
        "recipe_fingerprint": "0" * 16,
        "library_versions": {"torch": "2"},
        "device": Device(type="cpu", name="", num_processes=1),
        "outcome": Outcome(kind="ok"),
    }
    return RunRecord(**required | values)


def count_labels_per_row(record: RunRecord, global_batch: int) -> int:
    """Return the labeled tokens per example, which all examples share."""
    assert record.tokens is not None
    labels, remainder = divmod(record.tokens.labeled, global_batch * record.steps)
    assert remainder == 0 < labels
    return labels
