"""Records of runs without measurements, and a value derived from a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftbench.record import RECORD_FILE, Device, Outcome, RunRecord


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


def damage_records(folder: Path) -> dict[str, str]:
    """Create a run's folder for each kind of unreadable record; return a part of each reason, by the folder's name."""
    valid = minimal_record().model_dump_json()
    contents: dict[str, tuple[bytes, str]] = {
        "truncated": (valid[: len(valid) // 2].encode(), "not valid JSON"),
        "empty": (b"", "not valid JSON"),
        "text": (b"out of disk space", "not valid JSON"),
        "binary": (b"\xff\xfe\x00", "not valid JSON"),
        "nested": (b"[" * 100_000, "not valid JSON"),
        "list": (b"[]", "the file must be"),
        "null": (b"null", "the file must be"),
        "foreign": (json.dumps(json.loads(valid) | {"schema_version": 99}).encode(), "schema_version must be"),
        "other_program": (b'{"schema_version": 1, "outcome": "ok"}', "must be"),
        "unknown_field": (json.dumps(json.loads(valid) | {"flavor": "sweet"}).encode(), "flavor is not a field"),
    }
    for name, (content, _) in contents.items():
        (folder / name).mkdir(parents=True)
        (folder / name / RECORD_FILE).write_bytes(content)
    (folder / "folder" / RECORD_FILE).mkdir(parents=True)
    reasons = {name: reason for name, (_, reason) in contents.items()}
    return reasons | {"folder": "cannot be read: Is a directory"}
