"""What the charts draw, as rows of plain values: thinned where there is more than an eye or a screen can take."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

import numpy
from numpy.typing import NDArray

from peftbench.errors import BudgetError
from peftbench.evaluation.statistics import paired_interval, seeds_interval
from peftbench.record import Interval, RunRecord, train_peak_bytes
from peftbench.report.columns import method_label
from peftbench.report.configurations import Configuration
from peftbench.sizes import parse_size

Row = dict[str, str | int | float | None]

POINTS = 200
"""Of a curve, at most: where there are more steps, a point is the mean of several."""

RESAMPLED = 24
"""Configurations whose losses' intervals are resampled, at most, since each takes a while."""

OVER = {"step": "optimizer step", "tokens": "real tokens trained on", "seconds": "seconds of steps, warm-up included"}
"""What a loss is drawn over, and what the axis says."""

PARTS = {
    "weights": "weights", "gathered_weights": "gathered weights", "weight_copies": "autocast copies",
    "gradients": "gradients", "buckets": "buckets", "optimizer_state": "optimizer states",
    "activations": "activations", "logits": "logits", "temporaries": "temporaries",
    "rest": "the rest of the peak", "held": "held when refused", "asked": "asked for and refused",
}  # fmt: skip
"""Of a peak, in the order in which they are stacked, and what the legend calls them."""


def finite(value: float | None) -> float | None:
    """None for what is no number, of which JSON knows nothing."""
    return value if value is not None and math.isfinite(value) else None


def kind_of(record: RunRecord) -> str:
    """The method's kind."""
    return str(record.recipe["method"]["kind"])


def curves(records: Sequence[RunRecord]) -> list[Row]:
    """The training loss of each run, over steps, real tokens and seconds, at ``POINTS`` points or fewer."""
    rows: list[Row] = []
    for record in records:
        losses = numpy.asarray(record.losses, dtype=float)
        if not len(losses):
            continue
        over = {"step": numpy.arange(1, len(losses) + 1, dtype=float)}
        for name, each in (("tokens", record.step_tokens), ("seconds", record.step_seconds)):
            if len(each) == len(losses):
                over[name] = numpy.cumsum(numpy.asarray(each, dtype=float))
        thin = [_thinned(losses), *map(_thinned, over.values())]
        for loss, *places in zip(*thin, strict=True):
            rows.append({
                "run": method_label(record), "kind": kind_of(record), "loss": finite(float(loss)),
                **{name: float(place) for name, place in zip(over, places, strict=True)},
            })  # fmt: skip
    return rows


def _thinned(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Means of neighbours, as many as there may be points."""
    parts = numpy.array_split(values, min(POINTS, len(values)))
    return numpy.array([part.mean() for part in parts])


def memory(records: Sequence[RunRecord]) -> list[Row]:
    """Where the peak of each run's training went, in bytes by part."""
    rows: list[Row] = []
    for record in records:
        for order, (part, size) in enumerate(_parts(record)):
            rows.append({
                "run": method_label(record), "kind": kind_of(record), "part": PARTS[part],
                "order": list(PARTS).index(part) * 100 + order, "MiB": size / 2**20, "bytes": size,
            })  # fmt: skip
    return rows


def _parts(record: RunRecord) -> Iterator[tuple[str, int]]:
    """Parts of the peak with their bytes; the last is what no instrument tells apart."""
    outcome, peak = record.outcome, train_peak_bytes(record)
    if outcome.kind == "oom":
        yield from (
            (name, size) for name, size in (("held", outcome.held_bytes), ("asked", outcome.requested_bytes)) if size
        )
        return
    if peak is None:
        return
    known: dict[str, int] = {}
    if record.breakdown is not None:
        known = record.breakdown.bytes_by_kind
    elif record.state_bytes is not None:
        states = record.state_bytes
        known = {"weights": states.weights, "gradients": states.gradients, "optimizer_state": states.optimizer}
    yield from ((part, known[part]) for part in PARTS if known.get(part))
    if (rest := peak - sum(known.values())) > 0:
        yield "rest", rest


def budget_bytes(record: RunRecord) -> int | None:
    """What a run was held to, else what its device has, None where neither is known."""
    asked = (record.recipe.get("budget") or {}).get("memory")
    try:
        return parse_size(str(asked)) if asked is not None else record.device.memory_bytes
    except BudgetError:  # a record that was made by hand
        return None


def budgets(records: Sequence[RunRecord], *, beyond: float = 4.0) -> tuple[list[Row], int | None]:
    """A line for each run's budget; or none and the least budget, where all are ``beyond`` times the largest peak."""
    sizes = {method_label(r): size for r in records if (size := budget_bytes(r)) is not None and any(_parts(r))}
    largest = max((sum(size for _, size in _parts(record)) for record in records), default=0)
    if sizes and min(sizes.values()) > beyond * largest:
        return [], min(sizes.values())
    return [{"run": run, "budget": size / 2**20} for run, size in sizes.items()], None


def speed(records: Sequence[RunRecord]) -> list[Row]:
    """Real tokens a second of each run's timed steps: their mean, and from the slow steps' to the fast ones'."""
    rows: list[Row] = []
    for record in records:
        measured = record.throughput
        if measured is None or record.tokens is None or not record.steps:
            continue
        a_step = record.tokens.real / record.steps
        rows.append({
            "run": method_label(record), "kind": kind_of(record), "speed": measured.tokens_per_second.real,
            "slow": a_step / measured.step_seconds_p90, "fast": a_step / measured.step_seconds_p10,
        })  # fmt: skip
    return rows


def front(points: Sequence[Row], cost: str, quality: str, *, more_is_better: bool) -> list[Row]:
    """Those of ``points`` that none is better than at the same cost or less (Pareto), from the cheapest on."""
    sign = -1.0 if more_is_better else 1.0
    known = [point for point in points if point.get(cost) is not None and point.get(quality) is not None]
    known.sort(key=lambda point: (float(point[cost] or 0), sign * float(point[quality] or 0)))
    best = itertools.accumulate((sign * float(point[quality] or 0) for point in known), min, initial=float("inf"))
    return [p for p, before in zip(known, best, strict=False) if sign * float(p[quality] or 0) < before]


def rouge_l(record: RunRecord) -> Interval | None:
    """ROUGE-L of the generated summaries."""
    return (record.quality.rouge or {}).get("rougeL") if record.quality else None


def points(every: Sequence[Configuration], *, rouge: bool) -> list[Row]:
    """What each configuration brought and took: means over its seeds, and the 95 % interval of its quality.

    Quality is ROUGE-L or else the held-out loss. With several seeds the interval is over them, else over examples (of a
    loss, where there are ``RESAMPLED`` configurations or fewer); None where there is none.
    """
    made = []
    for one in every:
        values = one.rouge_l if rouge else one.losses
        interval = _interval(one, values, rouge=rouge, may_resample=len(every) <= RESAMPLED)
        peak, flops = one.peak_bytes, one.required_flops
        made.append({
            "run": one.label, "kind": one.kind, "quality": statistics.fmean(values) if values else None,
            "low": interval.low if interval else None, "high": interval.high if interval else None,
            "seeds": len(values), "MiB": None if peak is None else peak / 2**20, "seconds": one.train_seconds,
            "TFLOP": None if flops is None else flops / 1e12,
        })  # fmt: skip
    return made


def _interval(one: Configuration, values: Sequence[float], *, rouge: bool, may_resample: bool) -> Interval | None:
    if len(values) > 1:
        return seeds_interval(list(values))
    if rouge:
        return rouge_l(one.ok[0]) if values else None
    each = one.ok[0].quality.by_example if values and one.ok[0].quality else None
    if each is None or len(each.loss) < 2 or not may_resample:
        return None
    return paired_interval(each.loss, each.labelled)
