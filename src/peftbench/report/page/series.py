"""Data rows of the charts; long curves are downsampled."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from peftbench.evaluation.intervals import paired_intervals, t_interval
from peftbench.record import Interval, RunRecord
from peftbench.report.analysis.quality_metrics import HELD_OUT_LOSS, QualityMetric
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.runs import run_label
from peftbench.report.text.formatting import finite_or_none

ChartRow = dict[str, str | int | float | None]

MAX_CURVE_POINTS = 200
"""Maximum number of points of a curve; with more steps, a point is the mean of several."""

X_AXES = {
    "step": "optimizer step",
    "tokens": "real tokens trained on",
    "seconds": "step time (s), untimed steps included",
}
"""X axes of the loss curves, with their titles."""


NUM_COLORS = 8
"""Number of distinguishable colors and shapes; with more configurations, each method has one."""


@dataclass(frozen=True)
class ColorGroups:
    """Groups with their own color and shape, the same in every chart."""

    title: str
    names: tuple[str, ...]
    by_run: Mapping[int, str]
    """Group name by the id() of a record."""

    @classmethod
    def from_run_groups(cls, run_groups: Sequence[RunGroup]) -> ColorGroups:
        """Color by configuration, or by method if there are more than ``NUM_COLORS`` configurations."""
        by_group = len(run_groups) <= NUM_COLORS
        by_run = {id(run): group.label if by_group else group.method_kind for group in run_groups for run in group.runs}
        return cls("run" if by_group else "method", tuple(dict.fromkeys(by_run.values())), by_run)

    def __getitem__(self, record: RunRecord) -> str:
        return self.by_run[id(record)]


def loss_curve_rows(records: Sequence[RunRecord], color_groups: ColorGroups) -> list[ChartRow]:
    """Return each run's training loss over steps, real tokens and seconds, at most ``MAX_CURVE_POINTS`` points."""
    rows: list[ChartRow] = []
    for record in records:
        losses = numpy.asarray(record.step_losses, dtype=float)
        if not len(losses):
            continue
        x_values = {"step": numpy.arange(1, len(losses) + 1, dtype=float)}
        for name, per_step in (("tokens", record.step_tokens), ("seconds", record.step_seconds)):
            if len(per_step) == len(losses):
                x_values[name] = numpy.cumsum(numpy.asarray(per_step, dtype=float))
        downsampled = [_downsample(losses), *map(_downsample, x_values.values())]
        for loss, *xs in zip(*downsampled, strict=True):
            rows.append(
                {
                    "run": run_label(record),
                    "group": color_groups[record],
                    "loss": finite_or_none(float(loss)),
                    **{name: float(x) for name, x in zip(x_values, xs, strict=True)},
                }
            )
    return rows


def held_out_curve_rows(records: Sequence[RunRecord], color_groups: ColorGroups) -> list[ChartRow]:
    """Return the held-out loss of each evaluation during training; ``kept`` is 1 for the saved weights' step."""
    return [
        {
            "run": run_label(record),
            "group": color_groups[record],
            "step": point.step,
            "loss": finite_or_none(point.loss),
            "evaluation seconds": point.seconds,
            "kept": int(point.step == record.held_out_curve.kept_step),
        }
        for record in records
        if record.held_out_curve is not None
        for point in record.held_out_curve.points
    ]


def _downsample(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Return at most ``MAX_CURVE_POINTS`` means of neighboring values."""
    parts = numpy.array_split(values, min(MAX_CURVE_POINTS, len(values)))
    return numpy.array([part.mean() for part in parts])


def throughput_rows(records: Sequence[RunRecord], color_groups: ColorGroups) -> list[ChartRow]:
    """Return each run's real tokens per second: mean, and 10th and 90th percentile of its timed steps.

    For a record without tokens per step, the percentiles are mean tokens per step over the percentiles of step seconds.
    """
    rows: list[ChartRow] = []
    for record in records:
        measured = record.throughput
        if measured is None or record.tokens is None or not record.steps:
            continue
        tokens_per_step = record.tokens.real / record.steps
        fallback: tuple[float | None, float | None] = (None, None)
        if measured.step_seconds_p10 > 0:
            fallback = (tokens_per_step / measured.step_seconds_p90, tokens_per_step / measured.step_seconds_p10)
        p10, p90 = _token_rate_percentiles(record) or fallback
        rows.append(
            {
                "run": run_label(record),
                "group": color_groups[record],
                "p10": p10,
                "p90": p90,
                "tokens_per_second": measured.tokens_per_second.real,
            }
        )
    return rows


def _token_rate_percentiles(record: RunRecord) -> tuple[float, float] | None:
    """Return 10th and 90th percentile of the timed steps' tokens per second; None if unknown."""
    seconds, tokens = numpy.asarray(record.step_seconds, dtype=float), numpy.asarray(record.step_tokens, dtype=float)
    if len(seconds) != len(tokens) or not len(seconds) or not (seconds > 0).all():
        return None
    timed = numpy.ones(len(seconds), dtype=bool)
    for start in (0, *record.resumed_after):
        timed[start : start + record.untimed_steps] = False
    if not timed.any():
        return None
    p10, p90 = numpy.quantile(tokens[timed] / seconds[timed], [0.1, 0.9])
    return float(p10), float(p90)


def pareto_front(points: Sequence[ChartRow], cost: str, quality: str, *, higher_is_better: bool) -> list[ChartRow]:
    """Return the Pareto-optimal points, cheapest first: no other is better at the same or a lower cost."""
    sign = -1.0 if higher_is_better else 1.0
    known = [point for point in points if point.get(cost) is not None and point.get(quality) is not None]
    known.sort(key=lambda point: (float(point[cost] or 0), sign * float(point[quality] or 0)))
    best = itertools.accumulate((sign * float(point[quality] or 0) for point in known), min, initial=float("inf"))
    return [p for p, before in zip(known, best, strict=False) if sign * float(p[quality] or 0) < before]


def trade_off_rows(run_groups: Sequence[RunGroup], color_groups: ColorGroups, metric: QualityMetric) -> list[ChartRow]:
    """Return quality and costs of each group: means over seeds, and the 95 % interval of its quality.

    Quality is ``metric``. The interval is over seeds if there are several, else over examples; None if the record has
    no per-example scores.
    """
    example_intervals = _loss_intervals(run_groups) if metric == HELD_OUT_LOSS else _score_intervals(run_groups, metric)
    rows: list[ChartRow] = []
    for one in run_groups:
        values = one.means_by_seed(metric)
        interval = example_intervals.get(one)
        if len(values) > 1:
            interval = t_interval(list(values))
        peak, flops = one.mean_peak_bytes, one.mean_model_flops
        rows.append(
            {
                "run": one.label,
                "group": color_groups[one.runs[0]],
                "baseline": int(bool(one.ok_runs) and not one.is_trained),
                "quality": finite_or_none(statistics.fmean(values)) if values else None,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "seeds": len(values),
                "MiB": None if peak is None else peak / 2**20,
                "seconds": one.mean_train_seconds,
                "TFLOPs": None if flops is None else flops / 1e12,
            }
        )
    return rows


def _score_intervals(run_groups: Sequence[RunGroup], metric: QualityMetric) -> dict[RunGroup, Interval]:
    """Return the interval over examples of each group's first run that has the score."""
    scores = {one: [score for run in one.ok_runs if (score := metric.get_score(run))] for one in run_groups}
    return {one: known[0].interval for one, known in scores.items() if known}


def _loss_intervals(run_groups: Sequence[RunGroup]) -> dict[RunGroup, Interval]:
    """Return intervals over examples of the losses of groups with one seed; equal tokens share one resampling."""
    same_tokens: dict[tuple[int, ...], list[tuple[RunGroup, tuple[float, ...]]]] = {}
    for one in run_groups:
        quality = one.ok_runs[0].quality if len(one.means_by_seed(HELD_OUT_LOSS)) == 1 else None
        scores = quality.per_example if quality else None
        if scores is None or not all(map(math.isfinite, scores.loss)):
            continue
        if len(scores.loss) == len(scores.labeled_tokens) > 1:
            same_tokens.setdefault(scores.labeled_tokens, []).append((one, scores.loss))
    intervals_by_group: dict[RunGroup, Interval] = {}
    for labeled, losses in same_tokens.items():
        intervals = paired_intervals([loss for _, loss in losses], labeled)
        intervals_by_group |= {one: interval for (one, _), interval in zip(losses, intervals, strict=True)}
    return intervals_by_group
