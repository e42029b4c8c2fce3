"""Records with known figures."""

from __future__ import annotations

from typing import Any

from peftbench.record import Device, Interval, Outcome, Parameters, Quality, RunRecord, Sample, Tokens


def record(name: str, kind: str, trainable: int | None, **changes: Any) -> RunRecord:
    """A record with known figures."""
    recipe = {
        "name": name,
        "output_dir": "runs",
        "method": {"kind": kind},
        "train": {"seed": changes.pop("seed", 0), "global_batch": changes.pop("global_batch", 16), "precision": "fp32"},
        "data": {"seed": 0, "max_tokens": 64, "as_published": False},
    }
    score = Interval(mean=31.25, low=30.0, high=32.5)
    quality = Quality(
        split="test", examples=3, loss=changes.pop("loss", 3.25), perplexity=25.8,
        rouge=dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), score),
        samples=(Sample(id="a", article="one\ntwo", reference="ref | x", generated=f"by {name}"),),
    )  # fmt: skip
    values: dict[str, Any] = {
        "name": name, "started_at": "2026-01-01T00:00:00+00:00", "recipe": recipe, "recipe_fingerprint": "f",
        "outcome": Outcome(kind="ok"), "device": Device(kind="cpu", name="a CPU", processes=1), "versions": {},
        "parameters": Parameters(total=1000, trainable=trainable) if trainable is not None else None,
        "tokens": Tokens(real=1, padded=2, labelled=1, virtual=0), "steps": 5, "quality": quality,
        "phase_seconds": {"train": 12.5},
    }  # fmt: skip
    return RunRecord(**(values | changes))
