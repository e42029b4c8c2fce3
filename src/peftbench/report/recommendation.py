"""The recommendation at the head of a report, and what it applies to. It claims only what intervals support."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import PurePath

from peftbench.record import RunRecord
from peftbench.report.analysis.costs import cost_clause, find_cheaper_cost
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.analysis.significance import MIN_EXAMPLES, ComparisonSet, PairComparison
from peftbench.report.summary import seed_clause, select_reference
from peftbench.report.text.escape import printable_line
from peftbench.report.text.formatting import decimal_places, format_decimal, join_with_and, round_outward, truncate_list

_MAX_VALUES = 3
"""Maximum number of different models, data sets or devices that are listed."""


def recommend(comparison_set: ComparisonSet) -> list[str]:
    """Return which configuration to use, and sentences with the reasons; empty if no two configurations are compared.

    Candidates are the trained configurations that no other one is significantly better than. The cheapest of them is
    recommended: by memory, else time, else model FLOPs, where they differ measurably.
    """
    trained = [group for group in comparison_set.comparable_groups if group.is_trained]
    if not trained or not comparison_set.pair_comparisons:
        return []
    if comparison_set.num_examples < MIN_EXAMPLES:
        return [
            f"No recommendation: {comparison_set.num_examples} held-out examples are too few to compare quality (at "
            f"least {MIN_EXAMPLES} are needed)."
        ]
    candidates = [group for group in trained if not _find_better(group, trained, comparison_set)]
    choice = candidates[0]
    for group in candidates[1:]:
        choice = group if find_cheaper_cost(group, choice) else choice
    unbeaten = [
        baseline
        for baseline in comparison_set.comparable_groups
        if not baseline.is_trained and not any(_is_better(group, baseline, comparison_set) for group in trained)
    ]
    sentences = [f"If you train, use {choice.label}" if unbeaten else f"Use {choice.label}"]
    sentences += _explain_choice(choice, candidates, trained, comparison_set)
    if unbeaten:
        verb = "trains" if len(unbeaten) == 1 else "train"
        labels, seed = _join_labels(unbeaten), seed_clause(comparison_set.pair_comparisons)
        sentences.append(f"No trained configuration is significantly better{seed} than {labels}, which {verb} nothing")
    return [f"{sentence}." for sentence in sentences]


def _explain_choice(
    choice: RunGroup, candidates: Sequence[RunGroup], trained: Sequence[RunGroup], comparison_set: ComparisonSet
) -> list[str]:
    """Return the reasons: difference from the reference, costs of the other candidates, and what is worse."""
    if len(trained) == 1:
        return ["It is the only trained configuration whose quality can be compared"]
    reference, _ = select_reference(trained)
    worse = [group for group in trained if _is_better(choice, group, comparison_set)]
    seed = seed_clause(comparison_set.pair_comparisons)
    if len(worse) == len(trained) - 1:
        return [f"It is significantly better{seed} than every other trained configuration"]
    sentences = []
    if choice is not reference and (pair := comparison_set.between(choice, reference)) is not None:
        sentences.append(f"It {_describe_difference(pair)}{cost_clause(choice, reference)}")
    others = [group for group in candidates if group not in (choice, reference)] or [
        group for group in candidates if group is not choice
    ]
    sentences += _describe_candidates(choice, [] if sentences and others == [reference] else others, seed)
    if named := [group for group in worse if group is not reference]:
        sentences.append(f"{_join_labels(named)} {'is' if len(named) == 1 else 'are'} significantly worse{seed}")
    return sentences


def _describe_candidates(choice: RunGroup, others: Sequence[RunGroup], seed: str) -> list[str]:
    """Return sentences on configurations that are not significantly worse, by the cost in which they need more."""
    by_cost: dict[str | None, list[RunGroup]] = {}
    for group in others:
        by_cost.setdefault(find_cheaper_cost(choice, group), []).append(group)
    sentences = []
    for cost, groups in by_cost.items():
        verb, need = ("is", "needs") if len(groups) == 1 else ("are", "need")
        costs = f"{need} more {cost}" if cost else ("costs" if len(groups) == 1 else "cost") + " about the same"
        sentences.append(f"{_join_labels(groups)} {verb} not significantly worse{seed} and {costs}")
    return sentences


def _join_labels(groups: Sequence[RunGroup]) -> str:
    return join_with_and(truncate_list([group.label for group in groups]))


def _describe_difference(pair: PairComparison) -> str:
    """Return how the first of a pair differs from the second, as a predicate."""
    second, unit, digits = pair.second.label, pair.metric.unit, pair.metric.decimals
    seed, interval = seed_clause([pair]), pair.interval
    if interval.low == interval.high == 0:
        return f"has the same score as {second} on every example{seed}"
    low, high = round_outward(interval, digits)
    if pair.better_group is not None:
        which = "better" if pair.better_group is pair.first else "worse"
        by = format_decimal(abs(interval.mean), max(digits, decimal_places(low)))
        return f"is {which} than {second} by {by} {unit}{seed}"
    within = max((low.removeprefix("-"), high.removeprefix("-")), key=float)
    if float(within) >= pair.metric.max_difference:
        return f"is indistinguishable from {second}{seed}"
    return f"is within {within} {unit} of {second}{seed}"


def _find_better(group: RunGroup, others: Sequence[RunGroup], comparison_set: ComparisonSet) -> RunGroup | None:
    return next((other for other in others if _is_better(other, group, comparison_set)), None)


def _is_better(first: RunGroup, second: RunGroup, comparison_set: ComparisonSet) -> bool:
    """True if the first is significantly better than the second."""
    if first is second:
        return False
    pair = comparison_set.between(first, second)
    return pair is not None and pair.better_group is first


def describe_context(records: Sequence[RunRecord]) -> str:
    """Return what a recommendation applies to: model, data, device, budget and dates."""
    budgets = _list_values(records, lambda record: (record.recipe.get("budget") or {}).get("memory"))
    dates = sorted({record.started_at[:10] for record in records})
    parts = [
        f"Base model: {_join_values(_list_values(records, _name_model))}",
        f"{_join_values(_list_values(records, _name_data))}{_count_examples(records)}",
        _join_values(_list_values(records, lambda record: record.device.name or record.device.type)),
        f"memory budget {_join_values(budgets)}" if budgets else "no memory budget",
        dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    ]
    return "; ".join(printable_line(part) for part in parts)


def _name_model(record: RunRecord) -> str | None:
    path = (record.recipe.get("model") or {}).get("path")
    return None if path is None else _shorten_path(str(path))


def _name_data(record: RunRecord) -> str | None:
    source = (record.recipe.get("data") or {}).get("source") or {}
    path = source.get("path") or source.get("train") or source.get("kind")
    return None if path is None else _shorten_path(str(path))


def _count_examples(records: Sequence[RunRecord]) -> str:
    """Return the numbers of examples by split if all trained runs have the same."""
    trained = [record for record in records if record.tokens is not None] or records
    counts = {json.dumps(record.num_examples) for record in trained}
    if len(counts) != 1:
        return ""
    ordered = sorted(trained[0].num_examples.items(), key=lambda item: item[0] != "train")
    return f", {join_with_and([f'{count:,} {split}' for split, count in ordered])} examples" if ordered else ""


def _shorten_path(path: str) -> str:
    """Return the name of a file or folder; a page that is shared does not reveal the machine's folders."""
    return PurePath(path).name if path.startswith(("/", "~", ".")) else path


def _list_values(records: Sequence[RunRecord], get_value: Callable[[RunRecord], object]) -> list[str]:
    values = dict.fromkeys(str(value) for record in records if (value := get_value(record)) is not None)
    return list(values)


def _join_values(values: Sequence[str]) -> str:
    if len(values) > _MAX_VALUES:
        return f"{values[0]} and {len(values) - 1} others"
    return join_with_and(list(values)) if values else "unknown"
