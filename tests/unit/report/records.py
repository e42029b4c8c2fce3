"""Run records with known metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from peftbench.record import (
    Device,
    Engine,
    Flops,
    Interval,
    Memory,
    Outcome,
    ParameterCounts,
    PerExample,
    Quality,
    RunRecord,
    Sample,
    Throughput,
    Tokens,
    TokensPerSecond,
)
from tests.helpers.scores import build_scores


def build_record(name: str, kind: str, trainable: int | None, **changes: Any) -> RunRecord:
    """Build a record with known metrics."""
    recipe = {
        "name": name,
        "output_dir": "runs",
        "method": {"kind": kind} | changes.pop("method", {}),
        "train": {
            "seed": changes.pop("seed", 0),
            "global_batch_size": changes.pop("global_batch_size", 16),
            "precision": "fp32",
        },
        "data": {"seed": changes.pop("data_seed", 0), "max_length": 64, "label_padding": False},
    }
    score = Interval(mean=31.25, low=30.0, high=32.5)
    quality = Quality(
        split="test",
        num_examples=3,
        loss=changes.pop("loss", 3.25),
        perplexity=25.8,
        metrics=build_scores(rouge1=score, rouge2=score, rougeL=score, rougeLsum=score),
        headline_metric="rougeL",
        samples=(Sample(id="a", prompt="one\ntwo", reference="ref | x", generated=f"by {name}"),),
    )
    values: dict[str, Any] = {
        "name": name,
        "started_at": "2026-01-01T00:00:00+00:00",
        "recipe": recipe,
        "recipe_fingerprint": "f",
        "outcome": Outcome(kind="ok"),
        "device": Device(type="cpu", name="a CPU", num_processes=1),
        "library_versions": {},
        "parameters": ParameterCounts(total=1000, trainable=trainable) if trainable is not None else None,
        "tokens": Tokens(real=1, padded=2, labeled=1, virtual=0),
        "steps": 5,
        "quality": quality,
        "phase_seconds": {"train": 12.5},
    }
    return RunRecord(**(values | changes))


def build_judged_record(
    name: str,
    kind: str,
    rouge_l: Sequence[float] | None,
    *,
    losses: Sequence[float] = (),
    labeled: Sequence[int] = (),
    identity: str = "these",
    **changes: Any,
) -> RunRecord:
    """Build a record with per-example scores: ROUGE-L, or nats with token counts.

    Full fine-tuning trains all parameters, a baseline none.
    """
    count = len(rouge_l if rouge_l is not None else losses)
    score = Interval(mean=float(numpy.mean(rouge_l)), low=0, high=100) if rouge_l is not None else None
    rouge = {"rougeL": tuple(map(float, rouge_l))} if rouge_l is not None else {}
    is_trained = kind not in ("zero_shot", "lead")
    quality = Quality(
        split="test",
        num_examples=count,
        loss=sum(losses) / sum(labeled) if labeled else None,
        metrics=build_scores(rougeL=score) if score else {},
        headline_metric="rougeL" if score else None,
        per_example=PerExample(
            examples_fingerprint=identity, loss=tuple(losses), labeled_tokens=tuple(labeled), metrics=rouge
        ),
    )
    method_fields: dict[str, Any] = {"steps": 20} if is_trained else {"tokens": None, "steps": 0, "phase_seconds": {}}
    changes = {"quality": quality} | method_fields | changes
    return build_record(name, kind, 1000 if kind == "full" else 10 if is_trained else 0, **changes)


def build_costs(
    memory: int, seconds: float, flops: int, *, engine: str = "single", device: str = "a GPU"
) -> dict[str, Any]:
    """Return record fields of 20 steps: peak bytes, step seconds (10th and 90th percentile within 5 %), model FLOPs."""
    speed = Throughput(
        steps=20,
        step_seconds_median=seconds,
        step_seconds_p10=0.95 * seconds,
        step_seconds_p90=1.05 * seconds,
        samples_per_second=1.0,
        data_time_fraction=0.0,
        tokens_per_second=TokensPerSecond(real=1, padded=1, labeled=1, virtual=0),
    )
    return {
        "memory": {"train": Memory(allocated_bytes=memory)},
        "throughput": speed,
        "flops": Flops(model_flops=flops),
        "steps": 20,
        "phase_seconds": {"train": 20 * seconds},
        "device": Device(type="cuda", name=device, num_processes=1),
        "engine": Engine(
            name=engine,
            distributed_type="NO",
            mixed_precision="no",
            optimizer_class="AdamW",
            micro_batch_size=4,
            gradient_accumulation_steps=1,
            num_threads=2,
        ),
    }


def draw_scores(count: int, seed: int, spread: float = 5.0) -> list[float]:
    """Return normally distributed scores with mean 30."""
    return [float(value) for value in 30 + spread * numpy.random.default_rng(seed).normal(size=count)]
