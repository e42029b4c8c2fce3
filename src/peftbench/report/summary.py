"""The comparison in words, which say only what intervals support."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_FLOOR

from peftbench.record import Interval, RunRecord
from peftbench.report.analysis.comparability import protocol_differs, why_not_comparable
from peftbench.report.analysis.costs import cost_clause
from peftbench.report.analysis.outcomes import outcome_sentences
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.analysis.significance import ALPHA, MIN_EXAMPLES, ComparisonSet, PairComparison, compare_groups
from peftbench.report.text.formatting import decimal_places, format_decimal, join_with_and, round_outward, truncate_list

MAX_SENTENCES = 12
"""On configurations, and on how runs ended; the table has the others."""

_REFERENCE_METHOD = "full"
"""The method whose costs the others are there to spare."""


def summarize(records: Sequence[RunRecord], comparison_set: ComparisonSet | None = None) -> list[str]:
    """Sentences on all runs, the most important first. What no interval supports is never called a difference.

    ``compared`` is what :func:`differences` made of the same records, where it was made already.
    """
    comparison_set = comparison_set or compare_groups(records)
    said = []
    if protocol_differs([run for run in records if run.tokens is not None and run.outcome.kind == "ok"]):
        said.append(
            "These runs differ in more than their method (batches, steps, examples or lengths are not the same), so "
            "that no difference is put down to the method"
        )
    enough = comparison_set.pair_comparisons and comparison_set.num_examples >= MIN_EXAMPLES
    said += _quality_sentences(comparison_set) if enough else _cost_sentences(comparison_set)
    said += _commit_sentences(comparison_set.groups)
    said += _truncate_sentences([end for one in comparison_set.groups for end in outcome_sentences(one)])
    return [f"{sentence}." for sentence in (*said, *comparison_set.exclusion_notes)]


def _quality_sentences(comparison_set: ComparisonSet) -> list[str]:
    """Every compared configuration beside one of them, the baselines, and what the intervals are."""
    figure, there = comparison_set.pair_comparisons[0].metric, comparison_set.comparable_groups
    reference, chosen = _select_reference(there)
    others = [
        found
        for one in there
        if (one.is_trained or not reference.is_trained)
        and (found := comparison_set.between(one, reference)) is not None
    ]
    picked = {one for found in comparison_set.pair_comparisons for one in (found.first, found.second)}
    better = "higher" if figure.higher_is_better else "lower"
    return [
        f"Compared by {figure.name} ({better} is better) with {reference.label}{chosen}",
        *_truncate_sentences(
            [_quality_sentence(found) + cost_clause(found.first, reference) for found in others],
            len(there) - len(picked),
        ),
        *filter(
            None,
            (
                _baseline_sentence(o, comparison_set)
                for o in there
                if o in picked and reference.is_trained and not o.is_trained
            ),
        ),
        _interval_sentence(comparison_set),
    ]


def _commit_sentences(groups: Sequence[RunGroup]) -> list[str]:
    """That code may differ within a configuration, as nothing but seeds should."""
    commits = {one.label: {run.git_commit for run in one.ok_runs if run.git_commit is not None} for one in groups}
    several = [label for label, known in commits.items() if len(known) > 1]
    which = (
        f"the runs of each may differ in more than seeds: {join_with_and(truncate_list(several))}" if several else ""
    )
    return [f"Made by more than one commit, so that {which}"] if several else []


def _select_reference(groups: Sequence[RunGroup]) -> tuple[RunGroup, str]:
    """What the others are compared with, of configurations with the best mean first, and whether the mean chose it."""
    full = [one for one in groups if one.method_kind == _REFERENCE_METHOD]
    if full:
        return full[0], ", the best of its method by the same figure" if len(full) > 1 else ""
    trained = [one for one in groups if one.is_trained]
    return (trained or groups)[0], f", chosen as the best {'of those that train ' if trained else ''}by the same figure"


def _quality_sentence(comparison: PairComparison) -> str:
    """The first beside the second: which is better, or how far apart they can be at most."""
    first, second, unit = comparison.first.label, comparison.second.label, comparison.metric.unit
    interval, digits = comparison.interval, comparison.metric.decimals
    if interval.low == interval.high == 0:
        return f"{first} scores as {second} does on every example"
    if comparison.better_group is not None:
        away = interval if interval.mean > 0 else -interval
        low, high = round_outward(away, digits)
        which = "better" if comparison.better_group is comparison.first else "worse"
        by = format_decimal(away.mean, max(digits, decimal_places(low)))
        return f"{first} is {which} than {second} by {by} {unit} (interval {low} to {high})"
    low, high = round_outward(interval, digits)
    within = max((low.removeprefix("-"), high.removeprefix("-")), key=float)
    by_seeds_alone = (
        comparison.interval_over_seeds
        and comparison.interval_over_examples.excludes_zero
        and not comparison.interval_over_seeds.excludes_zero
    )
    why = "not significant" + (f" over {comparison.num_seeds} seeds" if by_seeds_alone else "")
    mean, low, high = _with_sign(format_decimal(interval.mean, digits)), _with_sign(low), _with_sign(high)
    if float(within) >= comparison.metric.max_difference:
        few = (
            f"{comparison.num_seeds} seeds" if comparison.interval_over_seeds else f"{comparison.num_examples} examples"
        )
        return f"{first} cannot be told apart from {second} (difference {mean}; of {few} the interval leaves the scale)"
    return f"{first} is within {within} {unit} of {second} (difference {mean}, interval {low} to {high}; {why})"


def _with_sign(text: str) -> str:
    return f"+{text}" if float(text) > 0 else text


def _baseline_sentence(baseline: RunGroup, comparison_set: ComparisonSet) -> str:
    """Which of the trained configurations differ from one that trains nothing; empty where none was compared."""
    found = [
        between
        for one in comparison_set.comparable_groups
        if one.is_trained and (between := comparison_set.between(one, baseline)) is not None
    ]
    better = [one for one in found if one.better_group is one.first]
    worse = [one for one in found if one.better_group is baseline]
    said = [_better_or_worse_clause(which, than) for which, than in ((better, "better"), (worse, "worse")) if which]
    if not better and found:
        said.insert(0, _none_better_sentence(found, comparison_set))
    return "; ".join(said)


def _none_better_sentence(pair_comparisons: Sequence[PairComparison], comparison_set: ComparisonSet) -> str:
    """That no trained configuration is better than a baseline, of those that were compared with it."""
    baseline = pair_comparisons[0].second.label
    if len(pair_comparisons) == sum(one.is_trained for one in comparison_set.groups):
        return f"No trained configuration is better than {baseline} beyond chance"
    if len(pair_comparisons) == 1:
        return f"{pair_comparisons[0].first.label}, which alone was compared with {baseline}, is not better than it beyond chance"
    return f"None of the {len(pair_comparisons)} that train and were compared is better than {baseline} beyond chance"


def _better_or_worse_clause(pair_comparisons: Sequence[PairComparison], direction: str) -> str:
    """Several that differ from one in the same direction, by the least that the intervals leave of any of them."""
    figure, than = pair_comparisons[0].metric, pair_comparisons[0].second.label
    least = min(min(abs(one.interval.low), abs(one.interval.high)) for one in pair_comparisons)
    digits = max(
        figure.decimals, decimal_places(round_outward(Interval(mean=least, low=least, high=least), figure.decimals)[0])
    )
    which = (
        f"{join_with_and([one.first.label for one in pair_comparisons])} {'are' if len(pair_comparisons) > 1 else 'is'}"
    )
    return f"{which} {direction} than {than}, by {format_decimal(least, digits, ROUND_FLOOR)} {figure.unit} at least"


def _interval_sentence(comparison_set: ComparisonSet) -> str:
    """What kind of intervals those are, said once."""
    count = (
        f"all {comparison_set.num_comparisons:,} comparisons together"
        if comparison_set.num_comparisons > 1
        else "the one comparison"
    )
    how = "paired bootstrap" if comparison_set.uses_bootstrap else "Student's t of paired differences"
    said = f"Intervals hold with {100 * (1 - ALPHA):.3g} % for {count}: {how} over {comparison_set.num_examples:,} held-out examples"
    trained = [one for one in comparison_set.pair_comparisons if one.first.is_trained or one.second.is_trained]
    seeds = sorted({one.num_seeds for one in trained})
    if not seeds:
        return said
    if seeds == [1]:
        return f"{said}, one seed each; another seed may order them otherwise"
    if seeds[0] == 1:
        return (
            f"{said} and Student's t over up to {seeds[-1]} seeds where a pair has several, whichever reaches further; "
            "a pair of one seed may be ordered otherwise by another"
        )
    over = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{said} and Student's t over {over} seeds, whichever reaches further"


def _cost_sentences(comparison_set: ComparisonSet) -> list[str]:
    """Costs beside full fine-tuning alone, and why nothing is said of quality where it was compared."""
    there = [one for one in comparison_set.groups if one.is_trained]
    reference = next((one for one in there if one.method_kind == _REFERENCE_METHOD), None)
    said = []
    if reference is not None:
        beside = (_cost_sentence(one, reference) for one in there if one is not reference)
        said = _truncate_sentences([sentence for sentence in beside if sentence])
    if comparison_set.pair_comparisons:
        said.append(
            f"Nothing is concluded about quality from {comparison_set.num_examples} held-out examples: of fewer than "
            f"{MIN_EXAMPLES} one odd example can make a difference"
        )
    return said


def _cost_sentence(group: RunGroup, reference: RunGroup) -> str:
    """Costs alone; empty where none are known."""
    if (reason := why_not_comparable(group, reference)) is not None:
        return f"{group.label} ran {reason} than {reference.label}, so that costs are not compared"
    told = cost_clause(group, reference)
    return f"{group.label} is compared with {reference.label} by costs alone{told}" if told else ""


def _truncate_sentences(sentences: Sequence[str], num_omitted: int = 0) -> list[str]:
    """The first sentences, and how many others there would be."""
    num_omitted += max(len(sentences) - MAX_SENTENCES, 0)
    return [*sentences[:MAX_SENTENCES], *([f"And {num_omitted:,} more in the table"] if num_omitted else [])]
