"""Suites with known figures, to be held against each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peftbench.record import Compute, Flops, Interval, Memory, PerExample, RunRecord, Throughput, TokensPerSecond
from peftbench.report.diff.compute import MetricDiff, RunDiff, SuiteDiff, diff_suites
from peftbench.report.diff.metrics import parse_thresholds
from peftbench.report.diff.render import print_diff
from tests.unit.report.records import record


def suite(folder: Path, *records: RunRecord) -> Path:
    """``folder`` with these records, each in a folder named after its run, as far as a name can be one."""
    folder.mkdir(exist_ok=True)
    for one in records:
        one.write(folder / re.sub(r"\W", "_", one.name))
    return folder


def held(tmp_path: Path, before: RunRecord, after: RunRecord, *thresholds: str) -> RunDiff:
    """One run held against another."""
    sides = suite(tmp_path / "A", before), suite(tmp_path / "B", after)
    (pair,) = diff_suites(*sides, parse_thresholds(thresholds)).runs
    return pair


def figures(pair: RunDiff) -> dict[str, MetricDiff]:
    """By name."""
    return {figure.name: figure for figure in pair.metrics}


def run(name: str = "lora", **changes: Any) -> RunRecord:
    """A run with every figure known, of a recipe of its own."""
    speed = Throughput(
        steps=5,
        step_seconds_median=1,
        step_seconds_p10=1,
        step_seconds_p90=1,
        samples_per_second=1.0,
        data_time_fraction=0,
        tokens_per_second=TokensPerSecond(real=changes.pop("speed", 1000.0), padded=1, labelled=1, virtual=0),
    )
    values: dict[str, Any] = {
        "throughput": speed,
        "recipe_fingerprint": name,
        "energy_joules": 40.0,
        "memory": {"train": Memory(allocated_bytes=changes.pop("peak", 1000))},
        "flops": Flops(model_flops=100, hardware_flops=200),
        "compute": Compute(model_flops_per_second=1.0, peak_flops_per_second=4.0),
    }
    return record(name, "lora", 10, **(values | changes))


def scored(
    rouge: tuple[float, ...],
    losses: tuple[float, ...] = (),
    *,
    identity: str = "same",
    labelled: tuple[int, ...] = (),
    loss: float = 3.25,
) -> RunRecord:
    """A run with each example's scores, whose means are as they must be."""
    made = run(loss=loss)
    assert made.quality is not None
    mean = sum(rouge) / len(rouge)
    quality = made.quality.model_copy(
        update={
            "rouge": {"rougeL": Interval(mean=mean, low=mean, high=mean)},
            "per_example": PerExample(
                examples_fingerprint=identity, loss=losses, labelled_tokens=labelled, rouge={"rougeL": rouge}
            ),
        }
    )
    return made.model_copy(update={"quality": quality})


def printed(found: SuiteDiff, capsys: pytest.CaptureFixture[str], console: Console | None = None) -> str:
    """What is printed, columns apart by one space."""
    print_diff(found, console)
    return "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
