"""Runs side by side: over seeds, and by the values of a knob."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, TypeGuard

from peftbench.errors import UnknownKeyError
from peftbench.record import RunRecord

_SEEDS = ("train.seed", "data.seed")
_NAMES = ("name", "output_dir")


def over_seeds(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """One row for runs that differ in their seeds alone: mean and standard deviation of loss and ROUGE-L."""
    rows = []
    for same in _alike(records, _SEEDS):
        good = [record.quality for record in same if record.quality is not None]
        if len(good) > 1:
            losses = [quality.loss for quality in good if _finite(quality.loss)]
            rouges = [quality.rouge["rougeL"].mean for quality in good if quality.rouge]
            rows.append({
                "method": str(same[0].recipe["method"]["kind"]), "seeds": str(len(good)),
                "held-out loss": _spread(losses, 3), "ROUGE-L": _spread(rouges, 1),
            })  # fmt: skip
    return rows


def by_knob(records: Sequence[RunRecord], knob: str) -> list[dict[str, str]]:
    """Held-out loss of runs that differ in ``knob`` (dotted) alone: a row a method, a column a value, the lowest bold.

    Raises:
        UnknownKeyError: a recipe has no such knob.
    """
    values = sorted({_value(r.recipe, knob) for r in records}, key=lambda value: (isinstance(value, str), value))
    rows = []
    for same in _alike(records, (knob,)):
        losses = {_value(r.recipe, knob): r.quality.loss for r in same if r.quality and _finite(r.quality.loss)}
        ends = {_value(r.recipe, knob): r.outcome.kind for r in same}
        best = min(losses, key=lambda value: losses[value]) if losses else None
        cells = {value: f"{losses[value]:.3f}" if value in losses else ends.get(value, "–") for value in values}
        rows.append(
            {"method": str(same[0].recipe["method"]["kind"])}
            | {str(value): f"**{cell}**" if value == best else cell for value, cell in cells.items()}
        )
    return rows


def _finite(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _alike(records: Sequence[RunRecord], knobs: Sequence[str]) -> list[list[RunRecord]]:
    """Groups of records whose recipes differ in nothing but their names and ``knobs``, in the order they first come."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        recipe = json.loads(json.dumps(record.recipe))
        for knob in (*_NAMES, *knobs):
            *parents, last = knob.split(".")
            place = recipe
            for parent in parents:
                place = place[parent]
            place[last] = None
        groups.setdefault(json.dumps(recipe, sort_keys=True), []).append(record)
    return list(groups.values())


def _value(recipe: dict[str, Any], knob: str) -> float | str:
    """A number as it is, anything else as JSON."""
    place: object = recipe
    for part in knob.split("."):
        if not isinstance(place, dict) or part not in place:
            raise UnknownKeyError(f"these runs have no knob {knob!r}", "give one that all have, as train.global_batch")
        place = place[part]
    return place if isinstance(place, (int, float)) and not isinstance(place, bool) else json.dumps(place)


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return "–"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
