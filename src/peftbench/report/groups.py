"""Runs side by side: over seeds, and by the values of a knob."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, TypeGuard

from peftbench.errors import UnknownKeyError
from peftbench.evaluation.statistics import seeds_interval
from peftbench.record import RunRecord
from peftbench.report.configurations import alike, configurations
from peftbench.report.digits import outward
from peftbench.report.lines import kind_of


def over_seeds(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """A row for each configuration of several runs: mean and standard deviation of loss and ROUGE-L over its seeds.

    In brackets stands the mean's 95 % interval over seeds, by Student's t.
    """
    return [
        {
            "method": one.label, "seeds": str(len(one.losses) or len(one.rouge_l)),
            "held-out loss": _spread(one.losses, 3), "ROUGE-L": _spread(one.rouge_l, 1),
        }
        for one in configurations(records) if max(len(one.losses), len(one.rouge_l)) > 1
    ]  # fmt: skip


def by_knob(records: Sequence[RunRecord], knob: str) -> list[dict[str, str]]:
    """Held-out loss of runs that differ in ``knob`` (dotted) alone: a row a method, a column a value, the lowest bold.

    Raises:
        UnknownKeyError: a recipe has no such knob.
    """
    values = sorted({_value(r.recipe, knob) for r in records}, key=lambda value: (isinstance(value, str), value))
    rows = []
    for same in alike(records, (knob,)):
        losses = {_value(r.recipe, knob): r.quality.loss for r in same if r.quality and _finite(r.quality.loss)}
        ends = {_value(r.recipe, knob): r.outcome.kind for r in same}
        best = min(losses, key=lambda value: losses[value]) if losses else None
        cells = {value: f"{losses[value]:.3f}" if value in losses else ends.get(value, "–") for value in values}
        rows.append(
            {"method": kind_of(same[0])}
            | {str(value): f"**{cell}**" if value == best else cell for value, cell in cells.items()}
        )
    return rows


def _finite(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _value(recipe: dict[str, Any], knob: str) -> float | str:
    """A number as it is, anything else as JSON."""
    place: object = recipe
    for part in knob.split("."):
        if not isinstance(place, dict) or part not in place:
            raise UnknownKeyError(f"these runs have no knob {knob!r}", "give one that all have, as train.global_batch_size")
        place = place[part]
    return place if isinstance(place, (int, float)) and not isinstance(place, bool) else json.dumps(place)


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return "–"
    low, high = outward(seeds_interval(values), digits)
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({low}–{high})"
