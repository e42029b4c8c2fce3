"""Metrics by which two runs are compared, and their regression thresholds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from peftbench.errors import OutOfRangeError, UnknownKeyError, WrongTypeError, did_you_mean
from peftbench.record import RunRecord, train_peak_bytes
from peftbench.report.analysis.quality_metrics import QualityMetric, list_scores

Better = Literal["higher", "lower"]

OUTCOME_METRIC = "outcome"
"""The only metric that is not a number; shown first."""

LOSS_METRIC = "held_out_loss"


@dataclass(frozen=True)
class ComparedMetric:
    """A metric of a run: how to read it from a record, its unit and its good direction."""

    name: str
    unit: str
    better: Better
    get_value: Callable[[RunRecord], float | None]
    """Return the value in ``unit``; None if the record lacks it."""
    format_value: Callable[[float], str]
    """Format a value, unit included."""
    is_quality: bool = False
    """True for a mean over held-out examples."""
    device_dependent: bool = False
    """True if some devices cannot measure it, so that a missing value on another device is not a regression."""


def _score_metric(metric: QualityMetric) -> ComparedMetric:
    digits = metric.decimals + 1
    better: Better = "higher" if metric.higher_is_better else "lower"
    return ComparedMetric(
        str(metric.score_name),
        metric.definition.unit,
        better,
        metric.get_value,
        lambda value: f"{value:.{digits}f}",
        is_quality=True,
    )


_LOSS = ComparedMetric(
    LOSS_METRIC, "nats", "lower", lambda r: r.quality.loss if r.quality else None, "{:.4f}".format, is_quality=True
)
_COSTS = (
    ComparedMetric("train_seconds", "seconds", "lower", lambda r: r.train_seconds, "{:,.1f} s".format),
    ComparedMetric(
        "tokens_per_second",
        "real tokens per second",
        "higher",
        lambda r: r.throughput.tokens_per_second.real if r.throughput else None,
        "{:,.0f}/s".format,
    ),
    ComparedMetric("train_peak_bytes", "bytes", "lower", train_peak_bytes, lambda size: f"{size / 2**20:,.1f} MiB"),
    ComparedMetric("model_flops", "FLOP", "lower", lambda r: r.flops.model_flops, lambda n: f"{n / 1e12:.4g} TFLOP"),
    ComparedMetric(
        "hardware_flops", "FLOP", "lower", lambda r: r.flops.hardware_flops, lambda n: f"{n / 1e12:.4g} TFLOP"
    ),
    ComparedMetric(
        "mfu", "fraction of the peak", "higher", lambda r: r.compute.mfu, "{:.2%}".format, device_dependent=True
    ),
    ComparedMetric(
        "train_joules", "joules", "lower", lambda r: r.energy_joules, "{:,.4g} J".format, device_dependent=True
    ),
)


def list_compared_metrics(records: Sequence[RunRecord]) -> dict[str, ComparedMetric]:
    """Return the metrics of these runs by name, in display order: loss, scores of the records, costs."""
    return {metric.name: metric for metric in (_LOSS, *map(_score_metric, list_scores(records)), *_COSTS)}


def metric_value(metric: ComparedMetric, record: RunRecord) -> float | None:
    """Return a run's value in ``metric.unit``; None if unknown, not finite, or the run's outcome is not ok.

    Values of a run that failed cover only some of its steps.
    """
    value = metric.get_value(record) if record.outcome.kind == "ok" else None
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Thresholds:
    """Allowed regression of each metric, as a fraction of the value before: 1/20 is five percent."""

    default: Fraction = Fraction(5, 100)
    by_metric: Mapping[str, Fraction] = field(default_factory=dict)

    def for_metric(self, metric_name: str) -> Fraction:
        """Return the threshold of a metric."""
        return self.by_metric.get(metric_name, self.default)

    def check_names(self, metric_names: Iterable[str]) -> None:
        """Check that a threshold is for one of these metrics.

        Raises:
            UnknownKeyError: no such metric; the message names the nearest.
        """
        names = list(metric_names)
        for name in self.by_metric:
            if name not in names:
                raise UnknownKeyError(f"--threshold: unknown metric {name!r}", did_you_mean(name, names))


def parse_thresholds(specs: Sequence[str]) -> Thresholds:
    """Parse thresholds: ``5%`` (or ``5``) for all metrics, ``held_out_loss=2%`` for one.

    Raises:
        WrongTypeError: not a percentage.
        OutOfRangeError: a metric has two thresholds.
    """
    thresholds: dict[str | None, Fraction] = {}
    for spec in specs:
        name, equals, number = spec.rpartition("=")
        key = name if equals else None
        if key in thresholds:
            raise OutOfRangeError(f"--threshold is given twice for {key or 'all metrics'}", "give it once")
        thresholds[key] = _parse_percentage(number, spec)
    default = thresholds.pop(None, Thresholds.default)
    return Thresholds(default, {name: share for name, share in thresholds.items() if name is not None})


def _parse_percentage(number: str, spec: str) -> Fraction:
    # No exponents: Fraction would expand 1e999999999 in full.
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", number, re.ASCII)
    if match is None:
        raise WrongTypeError(f"{spec!r} is not a threshold; give a nonnegative percentage, e.g. 5% or held_out_loss=2%")
    percent, sign = Fraction(match[1]), match[2]
    if 0 < percent < 1 and not sign:
        share = f"{float(100 * percent):g}%"
        raise WrongTypeError(f"{spec!r} is ambiguous; write {share} or {match[1]}%")
    return percent / 100
