"""What the charts draw, as rows of plain values: thinned where there is more than an eye or a screen can take."""

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
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.runs import run_label
from peftbench.report.text.formatting import finite_or_none

ChartRow = dict[str, str | int | float | None]

MAX_CURVE_POINTS = 200
"""Of a curve, at most: where there are more steps, a point is the mean of several."""

X_AXES = {"step": "optimizer step", "tokens": "real tokens trained on", "seconds": "seconds of steps, warm-up included"}
"""What a loss is drawn over, and what the axis says."""


NUM_COLORS = 8
"""Colours and shapes that can be told apart; of more configurations, methods have one each."""


@dataclass(frozen=True)
class ColorGroups:
    """What has a colour and a shape of its own, the same in every chart."""

    title: str
    names: tuple[str, ...]
    by_run: Mapping[int, str]
    """By the identity of a record."""

    @classmethod
    def from_run_groups(cls, run_groups: Sequence[RunGroup]) -> ColorGroups:
        """Configurations, or their methods where there are more than ``COLOURS`` of them."""
        few = len(run_groups) <= NUM_COLORS
        by_run = {id(run): one.label if few else one.method_kind for one in run_groups for run in one.runs}
        return cls("run" if few else "method", tuple(dict.fromkeys(by_run.values())), by_run)

    def __getitem__(self, record: RunRecord) -> str:
        return self.by_run[id(record)]


def loss_curve_rows(records: Sequence[RunRecord], color_groups: ColorGroups) -> list[ChartRow]:
    """The training loss of each run, over steps, real tokens and seconds, at ``POINTS`` points or fewer."""
    rows: list[ChartRow] = []
    for record in records:
        losses = numpy.asarray(record.step_losses, dtype=float)
        if not len(losses):
            continue
        over = {"step": numpy.arange(1, len(losses) + 1, dtype=float)}
        for name, each in (("tokens", record.step_tokens), ("seconds", record.step_seconds)):
            if len(each) == len(losses):
                over[name] = numpy.cumsum(numpy.asarray(each, dtype=float))
        thin = [_downsample(losses), *map(_downsample, over.values())]
        for loss, *places in zip(*thin, strict=True):
            rows.append(
                {
                    "run": run_label(record),
                    "group": color_groups[record],
                    "loss": finite_or_none(float(loss)),
                    **{name: float(place) for name, place in zip(over, places, strict=True)},
                }
            )
    return rows


def _downsample(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Means of neighbours, as many as there may be points."""
    parts = numpy.array_split(values, min(MAX_CURVE_POINTS, len(values)))
    return numpy.array([part.mean() for part in parts])


def throughput_rows(records: Sequence[RunRecord], color_groups: ColorGroups) -> list[ChartRow]:
    """Real tokens a second of each run: mean over its timed seconds, tenth and ninetieth percentile of its timed steps.

    Of a record without the tokens of each step, those are its mean tokens a step by the steps' percentiles.
    """
    rows: list[ChartRow] = []
    for record in records:
        measured = record.throughput
        if measured is None or record.tokens is None or not record.steps:
            continue
        known = measured.step_seconds_p10 > 0
        a_step = record.tokens.real / record.steps
        by_percentiles = (
            (a_step / measured.step_seconds_p90, a_step / measured.step_seconds_p10) if known else (None, None)
        )
        slow, fast = _token_rate_percentiles(record) or by_percentiles
        rows.append(
            {
                "run": run_label(record),
                "group": color_groups[record],
                "p10": slow,
                "p90": fast,
                "tokens_per_second": measured.tokens_per_second.real,
            }
        )
    return rows


def _token_rate_percentiles(record: RunRecord) -> tuple[float, float] | None:
    """Tenth and ninetieth percentile of the timed steps' tokens a second; None where they are not known."""
    seconds, tokens = numpy.asarray(record.step_seconds, dtype=float), numpy.asarray(record.step_tokens, dtype=float)
    if len(seconds) != len(tokens) or not len(seconds) or not (seconds > 0).all():
        return None
    timed = numpy.ones(len(seconds), dtype=bool)
    for began in (0, *record.resumed_after):
        timed[began : began + record.untimed_steps] = False
    if not timed.any():
        return None
    slow, fast = numpy.quantile(tokens[timed] / seconds[timed], [0.1, 0.9])
    return float(slow), float(fast)


def pareto_front(points: Sequence[ChartRow], cost: str, quality: str, *, higher_is_better: bool) -> list[ChartRow]:
    """Those of ``points`` that none is better than at the same cost or less (Pareto), from the cheapest on."""
    sign = -1.0 if higher_is_better else 1.0
    known = [point for point in points if point.get(cost) is not None and point.get(quality) is not None]
    known.sort(key=lambda point: (float(point[cost] or 0), sign * float(point[quality] or 0)))
    best = itertools.accumulate((sign * float(point[quality] or 0) for point in known), min, initial=float("inf"))
    return [p for p, before in zip(known, best, strict=False) if sign * float(p[quality] or 0) < before]


def rouge_l_interval(record: RunRecord) -> Interval | None:
    """ROUGE-L of the generated summaries."""
    return (record.quality.rouge or {}).get("rougeL") if record.quality else None


def trade_off_rows(run_groups: Sequence[RunGroup], color_groups: ColorGroups, *, uses_rouge: bool) -> list[ChartRow]:
    """What each configuration brought and took: means over its seeds, and the 95 % interval of its quality.

    Quality is ROUGE-L or else the held-out loss. With several seeds the interval is over them, else over examples; None
    where the record has no scores of those.
    """
    by_examples = {} if uses_rouge else _loss_intervals(run_groups)
    made: list[ChartRow] = []
    for one in run_groups:
        values = one.rouge_l_scores if uses_rouge else one.held_out_losses
        interval = by_examples.get(one)
        if len(values) > 1:
            interval = t_interval(list(values))
        elif uses_rouge and values:
            interval = next(filter(None, map(rouge_l_interval, one.ok_runs)))
        peak, flops = one.mean_peak_bytes, one.mean_model_flops
        made.append(
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
    return made


def _loss_intervals(run_groups: Sequence[RunGroup]) -> dict[RunGroup, Interval]:
    """Of the held-out loss of each configuration of one seed, over its examples; those of the same tokens together."""
    alike: dict[tuple[int, ...], list[tuple[RunGroup, tuple[float, ...]]]] = {}
    for one in run_groups:
        each = one.ok_runs[0].quality.per_example if len(one.held_out_losses) == 1 and one.ok_runs[0].quality else None
        if each is not None and len(each.loss) == len(each.labelled_tokens) > 1 and all(map(math.isfinite, each.loss)):
            alike.setdefault(each.labelled_tokens, []).append((one, each.loss))
    found: dict[RunGroup, Interval] = {}
    for labelled, losses in alike.items():
        intervals = paired_intervals([loss for _, loss in losses], labelled)
        found |= {one: interval for (one, _), interval in zip(losses, intervals, strict=True)}
    return found
