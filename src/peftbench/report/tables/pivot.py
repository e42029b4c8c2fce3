"""Pivot tables: statistics over seeds, and losses by the values of a recipe key."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, TypeGuard

from peftbench.errors import UnknownKeyError
from peftbench.evaluation.intervals import t_interval
from peftbench.record import RunRecord
from peftbench.report.analysis.quality_metrics import HELD_OUT_LOSS, list_headline_metrics
from peftbench.report.analysis.run_groups import group_runs, same_recipe_groups
from peftbench.report.runs import method_kind
from peftbench.report.text.formatting import round_outward


def seed_rows(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Return a row for each group with several seeds: mean ± standard deviation of loss and headline metrics.

    In brackets: the mean's 95 % interval over seeds (Student's t).
    """
    metrics = [HELD_OUT_LOSS, *list_headline_metrics(records)]
    rows = []
    for one in group_runs(records):
        means = {metric.name: one.means_by_seed(metric) for metric in metrics}
        counts = [len(values) for values in means.values() if values]
        if max(counts, default=0) > 1:
            cells = {metric.name: _format_mean_std(means[metric.name], metric.decimals) for metric in metrics}
            rows.append({"method": one.label, "seeds": str(counts[0])} | cells)
    return rows


def rows_by_setting(records: Sequence[RunRecord], key: str) -> list[dict[str, str]]:
    """Return held-out losses of runs that differ only in ``key``: a row per method, a column per value, lowest in bold.

    Raises:
        UnknownKeyError: a recipe lacks the key.
    """
    values = sorted({_setting_value(r.recipe, key) for r in records}, key=lambda value: (isinstance(value, str), value))
    rows = []
    for same in same_recipe_groups(records, (key,)):
        losses = {
            _setting_value(r.recipe, key): r.quality.loss for r in same if r.quality and _is_finite(r.quality.loss)
        }
        ends = {_setting_value(r.recipe, key): r.outcome.kind for r in same}
        best = min(losses, key=lambda value: losses[value]) if losses else None
        cells = {value: f"{losses[value]:.3f}" if value in losses else ends.get(value, "–") for value in values}
        rows.append(
            {"method": method_kind(same[0])}
            | {str(value): f"**{cell}**" if value == best else cell for value, cell in cells.items()}
        )
    return rows


def _is_finite(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _setting_value(recipe: dict[str, Any], key: str) -> float | str:
    """Return the value of a dotted key: a number unchanged, anything else as JSON."""
    value: object = recipe
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UnknownKeyError(
                f"these runs have no recipe key {key!r}", "give a key of all recipes, e.g. train.global_batch_size"
            )
        value = value[part]
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else json.dumps(value)


def _format_mean_std(values: Sequence[float], decimals: int) -> str:
    if len(values) < 2:
        return "–"
    low, high = round_outward(t_interval(values), decimals)
    return f"{statistics.mean(values):.{decimals}f} ± {statistics.stdev(values):.{decimals}f} ({low}–{high})"
