"""The comparison in words, which say only what intervals support."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_FLOOR

from peftbench.record import Interval, RunRecord
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.analysis.costs import why_not_comparable, cost_clause
from peftbench.report.analysis.significance import MIN_EXAMPLES, ALPHA, ComparisonSet, PairComparison, compare_groups
from peftbench.report.digits import round_outward, decimal_places, format_decimal
from peftbench.report.analysis.outcomes import outcome_sentences
from peftbench.report.text.formatting import truncate_list, join_with_and
from peftbench.report.analysis.comparability import protocol_differs

MAX_SENTENCES = 12
"""On configurations, and on how runs ended; the table has the others."""

_REFERENCE_METHOD = "full"
"""The method whose costs the others are there to spare."""


def summarize(records: Sequence[RunRecord], compared: ComparisonSet | None = None) -> list[str]:
    """Sentences on all runs, the most important first. What no interval supports is never called a difference.

    ``compared`` is what :func:`differences` made of the same records, where it was made already.
    """
    compared = compared or compare_groups(records)
    said = []
    if protocol_differs([run for run in records if run.tokens is not None and run.outcome.kind == "ok"]):
        said.append(
            "These runs differ in more than their method (batches, steps, examples or lengths are not the same), so "
            "that no difference is put down to the method"
        )
    enough = compared.differences and compared.examples >= MIN_EXAMPLES
    said += _quality_sentences(compared) if enough else _cost_sentences(compared)
    said += _commit_sentences(compared.every)
    said += _truncate_sentences([end for one in compared.every for end in outcome_sentences(one)])
    return [f"{sentence}." for sentence in (*said, *compared.unpaired)]


def _quality_sentences(compared: ComparisonSet) -> list[str]:
    """Every compared configuration beside one of them, the baselines, and what the intervals are."""
    figure, there = compared.differences[0].figure, compared.configurations
    reference, chosen = _select_reference(there)
    others = [
        found for one in there
        if (one.trains or not reference.trains) and (found := compared.between(one, reference)) is not None
    ]  # fmt: skip
    picked = {one for found in compared.differences for one in (found.first, found.second)}
    better = "higher" if figure.higher_is_better else "lower"
    return [
        f"Compared by {figure.name} ({better} is better) with {reference.label}{chosen}",
        *_truncate_sentences([_quality_sentence(found) + cost_clause(found.first, reference) for found in others], len(there) - len(picked)),
        *filter(None, (_baseline_sentence(o, compared) for o in there if o in picked and reference.trains and not o.trains)),
        _interval_sentence(compared),
    ]


def _commit_sentences(every: Sequence[RunGroup]) -> list[str]:
    """That code may differ within a configuration, as nothing but seeds should."""
    commits = {one.label: {run.git for run in one.ok if run.git is not None} for one in every}
    several = [label for label, known in commits.items() if len(known) > 1]
    which = f"the runs of each may differ in more than seeds: {join_with_and(truncate_list(several))}" if several else ""
    return [f"Made by more than one commit, so that {which}"] if several else []


def _select_reference(there: Sequence[RunGroup]) -> tuple[RunGroup, str]:
    """What the others are compared with, of configurations with the best mean first, and whether the mean chose it."""
    full = [one for one in there if one.kind == _REFERENCE_METHOD]
    if full:
        return full[0], ", the best of its method by the same figure" if len(full) > 1 else ""
    trained = [one for one in there if one.trains]
    return (trained or there)[0], f", chosen as the best {'of those that train ' if trained else ''}by the same figure"


def _quality_sentence(found: PairComparison) -> str:
    """The first beside the second: which is better, or how far apart they can be at most."""
    first, second, unit = found.first.label, found.second.label, found.figure.unit
    interval, digits = found.interval, found.figure.digits
    if interval.low == interval.high == 0:
        return f"{first} scores as {second} does on every example"
    if found.better is not None:
        away = interval if interval.mean > 0 else -interval
        low, high = round_outward(away, digits)
        which = "better" if found.better is found.first else "worse"
        by = format_decimal(away.mean, max(digits, decimal_places(low)))
        return f"{first} is {which} than {second} by {by} {unit} (interval {low} to {high})"
    low, high = round_outward(interval, digits)
    within = max((low.removeprefix("-"), high.removeprefix("-")), key=float)
    by_seeds_alone = found.over_seeds and found.over_examples.excludes_zero and not found.over_seeds.excludes_zero
    why = "not significant" + (f" over {found.seeds} seeds" if by_seeds_alone else "")
    mean, low, high = _with_sign(format_decimal(interval.mean, digits)), _with_sign(low), _with_sign(high)
    if float(within) >= found.figure.furthest:
        few = f"{found.seeds} seeds" if found.over_seeds else f"{found.examples} examples"
        return f"{first} cannot be told apart from {second} (difference {mean}; of {few} the interval leaves the scale)"
    return f"{first} is within {within} {unit} of {second} (difference {mean}, interval {low} to {high}; {why})"


def _with_sign(text: str) -> str:
    return f"+{text}" if float(text) > 0 else text


def _baseline_sentence(baseline: RunGroup, compared: ComparisonSet) -> str:
    """Which of the trained configurations differ from one that trains nothing; empty where none was compared."""
    found = [
        between for one in compared.configurations
        if one.trains and (between := compared.between(one, baseline)) is not None
    ]  # fmt: skip
    better = [one for one in found if one.better is one.first]
    worse = [one for one in found if one.better is baseline]
    said = [_better_or_worse_clause(which, than) for which, than in ((better, "better"), (worse, "worse")) if which]
    if not better and found:
        said.insert(0, _none_better_sentence(found, compared))
    return "; ".join(said)


def _none_better_sentence(found: Sequence[PairComparison], compared: ComparisonSet) -> str:
    """That no trained configuration is better than a baseline, of those that were compared with it."""
    baseline = found[0].second.label
    if len(found) == sum(one.trains for one in compared.every):
        return f"No trained configuration is better than {baseline} beyond chance"
    if len(found) == 1:
        return f"{found[0].first.label}, which alone was compared with {baseline}, is not better than it beyond chance"
    return f"None of the {len(found)} that train and were compared is better than {baseline} beyond chance"


def _better_or_worse_clause(found: Sequence[PairComparison], how: str) -> str:
    """Several that differ from one in the same direction, by the least that the intervals leave of any of them."""
    figure, than = found[0].figure, found[0].second.label
    least = min(min(abs(one.interval.low), abs(one.interval.high)) for one in found)
    digits = max(figure.digits, decimal_places(round_outward(Interval(mean=least, low=least, high=least), figure.digits)[0]))
    which = f"{join_with_and([one.first.label for one in found])} {'are' if len(found) > 1 else 'is'}"
    return f"{which} {how} than {than}, by {format_decimal(least, digits, ROUND_FLOOR)} {figure.unit} at least"


def _interval_sentence(compared: ComparisonSet) -> str:
    """What kind of intervals those are, said once."""
    count = f"all {compared.comparisons:,} comparisons together" if compared.comparisons > 1 else "the one comparison"
    how = "paired bootstrap" if compared.bootstrapped else "Student's t of paired differences"
    said = (
        f"Intervals hold with {100 * (1 - ALPHA):.3g} % for {count}: {how} over {compared.examples:,} held-out examples"
    )
    trained = [one for one in compared.differences if one.first.trains or one.second.trains]
    seeds = sorted({one.seeds for one in trained})
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


def _cost_sentences(compared: ComparisonSet) -> list[str]:
    """Costs beside full fine-tuning alone, and why nothing is said of quality where it was compared."""
    there = [one for one in compared.every if one.trains]
    reference = next((one for one in there if one.kind == _REFERENCE_METHOD), None)
    said = []
    if reference is not None:
        beside = (_cost_sentence(one, reference) for one in there if one is not reference)
        said = _truncate_sentences([sentence for sentence in beside if sentence])
    if compared.differences:
        said.append(
            f"Nothing is concluded about quality from {compared.examples} held-out examples: of fewer than "
            f"{MIN_EXAMPLES} one odd example can make a difference"
        )
    return said


def _cost_sentence(one: RunGroup, reference: RunGroup) -> str:
    """Costs alone; empty where none are known."""
    if (reason := why_not_comparable(one, reference)) is not None:
        return f"{one.label} ran {reason} than {reference.label}, so that costs are not compared"
    told = cost_clause(one, reference)
    return f"{one.label} is compared with {reference.label} by costs alone{told}" if told else ""


def _truncate_sentences(said: Sequence[str], more: int = 0) -> list[str]:
    """The first sentences, and how many others there would be."""
    more += max(len(said) - MAX_SENTENCES, 0)
    return [*said[:MAX_SENTENCES], *([f"And {more:,} more in the table"] if more else [])]
