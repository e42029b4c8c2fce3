"""Suites with known metrics, to be compared with each other."""

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
from tests.helpers.scores import build_scores
from tests.unit.report.records import build_record


def write_suite(folder: Path, *records: RunRecord) -> Path:
    """Write each record to a folder named after its run, and return ``folder``."""
    folder.mkdir(exist_ok=True)
    for run_record in records:
        run_record.write(folder / re.sub(r"\W", "_", run_record.name))
    return folder


def compare_runs(tmp_path: Path, before: RunRecord, after: RunRecord, *thresholds: str) -> RunDiff:
    """Write two runs as suites A and B, and return their comparison."""
    suites = write_suite(tmp_path / "A", before), write_suite(tmp_path / "B", after)
    (pair,) = diff_suites(*suites, parse_thresholds(thresholds)).runs
    return pair


def metrics_by_name(pair: RunDiff) -> dict[str, MetricDiff]:
    """Return the compared metrics by name."""
    return {metric.name: metric for metric in pair.metrics}


def build_run(name: str = "lora", **changes: Any) -> RunRecord:
    """Build a run whose metrics are all known, with its name as its recipe fingerprint."""
    speed = Throughput(
        steps=5,
        step_seconds_median=1,
        step_seconds_p10=1,
        step_seconds_p90=1,
        samples_per_second=1.0,
        data_time_fraction=0,
        tokens_per_second=TokensPerSecond(real=changes.pop("speed", 1000.0), padded=1, labeled=1, virtual=0),
    )
    values: dict[str, Any] = {
        "throughput": speed,
        "recipe_fingerprint": name,
        "energy_joules": 40.0,
        "memory": {"train": Memory(allocated_bytes=changes.pop("peak", 1000))},
        "flops": Flops(model_flops=100, hardware_flops=200),
        "compute": Compute(model_flops_per_second=1.0, peak_flops_per_second=4.0),
    }
    return build_record(name, "lora", 10, **(values | changes))


def build_scored_run(
    rouge: tuple[float, ...],
    losses: tuple[float, ...] = (),
    *,
    identity: str = "same",
    labeled: tuple[int, ...] = (),
    loss: float = 3.25,
) -> RunRecord:
    """Build a run with per-example scores and their mean ROUGE-L."""
    run = build_run(loss=loss)
    assert run.quality is not None
    mean = sum(rouge) / len(rouge)
    quality = run.quality.model_copy(
        update={
            "metrics": build_scores(rougeL=Interval(mean=mean, low=mean, high=mean)),
            "per_example": PerExample(
                examples_fingerprint=identity, loss=losses, labeled_tokens=labeled, metrics={"rougeL": rouge}
            ),
        }
    )
    return run.model_copy(update={"quality": quality})


def capture_printed(diff: SuiteDiff, capsys: pytest.CaptureFixture[str], console: Console | None = None) -> str:
    """Print the comparison and return the output, with one space between columns."""
    print_diff(diff, console)
    return "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
