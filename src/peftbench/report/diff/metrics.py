"""The figures by which two runs are held against each other, and how far each may change for the worse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from peftbench.errors import OutOfRangeError, UnknownKeyError, WrongTypeError, did_you_mean
from peftbench.record import RunRecord, train_peak_bytes

Better = Literal["higher", "lower"]

OUTCOME_METRIC = "outcome"
"""The figure that is no number, and comes first."""

LOSS_METRIC = "held_out_loss"


@dataclass(frozen=True)
class Metric:
    """One figure of a run: where a record has it, in which unit, and which direction is good."""

    name: str
    unit: str
    better: Better
    get_value: Callable[[RunRecord], float | None]
    """In ``unit``; None where the record does not say."""
    format_value: Callable[[float], str]
    """As a person reads it, unit included."""
    is_quality: bool = False
    """It is a mean over held-out examples."""
    device_dependent: bool = False
    """Some devices do not tell it, so that on another one it may be unknown, and has not fallen."""


def _rouge_metric(rouge_type: str) -> Metric:
    def mean(record: RunRecord) -> float | None:
        found = (record.quality.rouge or {}).get(rouge_type) if record.quality else None
        return found.mean if found else None

    return Metric(rouge_type, "percent", "higher", mean, "{:.2f}".format, is_quality=True)


METRICS: dict[str, Metric] = {
    kind.name: kind
    for kind in (
        Metric(
            LOSS_METRIC,
            "nats",
            "lower",
            lambda r: r.quality.loss if r.quality else None,
            "{:.4f}".format,
            is_quality=True,
        ),
        *map(_rouge_metric, ("rouge1", "rouge2", "rougeL", "rougeLsum")),
        Metric("train_seconds", "seconds", "lower", lambda r: r.train_seconds, "{:,.1f} s".format),
        Metric(
            "tokens_per_second",
            "real tokens per second",
            "higher",
            lambda r: r.throughput.tokens_per_second.real if r.throughput else None,
            "{:,.0f}/s".format,
        ),
        Metric("train_peak_bytes", "bytes", "lower", train_peak_bytes, lambda size: f"{size / 2**20:,.1f} MiB"),
        Metric("model_flops", "FLOP", "lower", lambda r: r.flops.model_flops, lambda n: f"{n / 1e12:.4g} TFLOPs"),
        Metric("hardware_flops", "FLOP", "lower", lambda r: r.flops.hardware_flops, lambda n: f"{n / 1e12:.4g} TFLOPs"),
        Metric(
            "mfu", "fraction of the peak", "higher", lambda r: r.compute.mfu, "{:.2%}".format, device_dependent=True
        ),
        Metric("train_joules", "joules", "lower", lambda r: r.energy_joules, "{:,.4g} J".format, device_dependent=True),
    )
}
"""By name, in the order in which they are shown."""


def metric_value(metric: Metric, record: RunRecord) -> float | None:
    """A run's figure in ``kind.unit``, or None where there is none.

    A run that did not end well has figures of some of its steps, which are no figures of the run; and a loss that is
    not finite is none.
    """
    found = metric.get_value(record) if record.outcome.kind == "ok" else None
    return found if found is not None and math.isfinite(found) else None


@dataclass(frozen=True)
class Thresholds:
    """How far a figure may change for the worse before it fell: shares of what it was, so 1/20 for five percent."""

    default: Fraction = Fraction(5, 100)
    by_metric: Mapping[str, Fraction] = field(default_factory=dict)

    def for_metric(self, metric_name: str) -> Fraction:
        """That of one figure."""
        return self.by_metric.get(metric_name, self.default)


def parse_thresholds(specs: Sequence[str]) -> Thresholds:
    """Thresholds of ``5%`` (or ``5``), which is that of every figure, and ``rougeL=2%``, which is that of one.

    Raises:
        UnknownKeyError: there is no such figure; names the nearest.
        WrongTypeError: what is given is no percentage.
        OutOfRangeError: one figure has two.
    """
    found: dict[str | None, Fraction] = {}
    for word in specs:
        name, equals, number = word.rpartition("=")
        if equals and name not in METRICS:
            raise UnknownKeyError(
                f"there is no figure {name!r} that a threshold could be of", did_you_mean(name, METRICS)
            )
        key = name if equals else None
        if key in found:
            raise OutOfRangeError(f"--threshold is given twice for {key or 'all figures'}", "give one of the two")
        found[key] = _parse_percentage(number, word)
    default = found.pop(None, Thresholds.default)
    return Thresholds(default, {name: share for name, share in found.items() if name is not None})


def _parse_percentage(number: str, spec: str) -> Fraction:
    # Nothing with an exponent: 1e999999999 would be computed in full.
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", number, re.ASCII)
    if match is None:
        raise WrongTypeError(f"{spec!r} is no threshold; give a percentage of zero or more, as 5% or rougeL=2%")
    percent, sign = Fraction(match[1]), match[2]
    if 0 < percent < 1 and not sign:
        share = f"{float(100 * percent):g}%"
        raise WrongTypeError(f"{spec!r} may mean {share} or {match[1]}%; write the one that is meant, with its %")
    return percent / 100
