"""Summary sentences of a comparison. They claim only what intervals support."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_FLOOR

from peftbench.record import Interval, RunRecord
from peftbench.report.analysis.comparability import list_protocol_differences, why_not_comparable
from peftbench.report.analysis.costs import cost_clause
from peftbench.report.analysis.outcomes import outcome_sentences
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.analysis.significance import ALPHA, MIN_EXAMPLES, ComparisonSet, PairComparison, compare_groups
from peftbench.report.runs import method_kind
from peftbench.report.text.formatting import decimal_places, format_decimal, join_with_and, round_outward, truncate_list

RECOMMENDED_SEEDS = 3
"""Number of seeds advised for runs with one; with two, an interval over seeds is several times as wide."""

MAX_SENTENCES = 12
"""Maximum number of sentences on configurations, and on outcomes; the table has the others."""
MANY_METHODS = 8
"""Smallest number of methods for which a summary states that their learning rates were not tuned."""


def summarize(records: Sequence[RunRecord], comparison_set: ComparisonSet | None = None) -> list[str]:
    """Return sentences on all runs, most important first. Only differences supported by intervals are called that.

    ``comparison_set`` is the result of :func:`compare_groups` for the same records, if already computed.
    """
    comparison_set = comparison_set or compare_groups(records)
    sentences = []
    trained = [run for run in records if run.tokens is not None and run.outcome.kind == "ok"]
    if differences := list_protocol_differences(trained):
        sentences.append(
            f"These runs differ in more than their method: in {join_with_and(differences)}. A difference between them "
            "may not be due to the method"
        )
    sentences += _rate_sentences(trained)
    has_enough_examples = comparison_set.pair_comparisons and comparison_set.num_examples >= MIN_EXAMPLES
    sentences += _quality_sentences(comparison_set) if has_enough_examples else _cost_sentences(comparison_set)
    sentences += _commit_sentences(comparison_set.groups)
    sentences += _truncate_sentences([s for group in comparison_set.groups for s in outcome_sentences(group)])
    return [f"{sentence}." for sentence in (*sentences, *comparison_set.exclusion_notes)]


def _quality_sentences(comparison_set: ComparisonSet) -> list[str]:
    """Return a sentence for each configuration compared with the reference, the baselines, and the intervals."""
    metric, groups = comparison_set.pair_comparisons[0].metric, comparison_set.comparable_groups
    reference, selection = select_reference(groups)
    others = [
        comparison
        for group in groups
        if (group.is_trained or not reference.is_trained)
        and (comparison := comparison_set.between(group, reference)) is not None
    ]
    compared = {group for pair in comparison_set.pair_comparisons for group in (pair.first, pair.second)}
    better = "higher" if metric.higher_is_better else "lower"
    return [
        f"Compared by {metric.name} ({better} is better) with {reference.label}{selection}",
        *_truncate_sentences(
            [_quality_sentence(pair) + cost_clause(pair.first, reference) for pair in others],
            len(groups) - len(compared),
        ),
        *filter(
            None,
            (
                _baseline_sentence(group, comparison_set)
                for group in groups
                if group in compared and reference.is_trained and not group.is_trained
            ),
        ),
        _interval_sentence(comparison_set),
    ]


def _rate_sentences(trained: Sequence[RunRecord]) -> list[str]:
    """Return a sentence that learning rates were not tuned, if many methods ran at one rate each."""
    rates_by_method: dict[str, set[float | None]] = {}
    for run in trained:
        rates = rates_by_method.setdefault(method_kind(run), set())
        rates.add(run.recipe.get("optimizer", {}).get("learning_rate"))
    if len(rates_by_method) < MANY_METHODS or any(len(rates) > 1 for rates in rates_by_method.values()):
        return []
    return [
        f"Not tuned: each of the {len(rates_by_method)} methods ran at one learning rate. Another rate may change the "
        "order"
    ]


def _commit_sentences(groups: Sequence[RunGroup]) -> list[str]:
    """Return a warning if the runs of a configuration were made by different commits."""
    commits = {one.label: {run.git_commit for run in one.ok_runs if run.git_commit is not None} for one in groups}
    mixed_labels = [label for label, known in commits.items() if len(known) > 1]
    if not mixed_labels:
        return []
    labels = join_with_and(truncate_list(mixed_labels))
    return [f"Runs of one configuration come from different commits, so not only seeds may differ: {labels}"]


def _is_full_fine_tuning(group: RunGroup) -> bool:
    """True if a run with outcome ok trained all parameters of the model."""
    counts = [run.parameters for run in group.ok_runs if run.parameters is not None]
    return any(count.trainable == count.total for count in counts)


def select_reference(groups: Sequence[RunGroup]) -> tuple[RunGroup, str]:
    """Return the reference among ``groups`` (best mean first), and a clause if its mean selected it."""
    full = [one for one in groups if _is_full_fine_tuning(one)]
    if full:
        return full[0], ", the best of its method by this metric" if len(full) > 1 else ""
    trained = [one for one in groups if one.is_trained]
    return (trained or groups)[0], f", selected as the best {'trained ' if trained else ''}configuration by this metric"


def _quality_sentence(comparison: PairComparison) -> str:
    """Return which of the two is better, or the largest difference that the interval allows."""
    first, second, unit = comparison.first.label, comparison.second.label, comparison.metric.unit
    interval, digits, seed = comparison.interval, comparison.metric.decimals, seed_clause([comparison])
    if interval.low == interval.high == 0:
        return f"{first} has the same score as {second} on every example{seed}"
    if comparison.better_group is not None:
        away = interval if interval.mean > 0 else -interval
        low, high = round_outward(away, digits)
        which = "better" if comparison.better_group is comparison.first else "worse"
        by = format_decimal(away.mean, max(digits, decimal_places(low)))
        return f"{first} is {which} than {second} by {by} {unit}{seed} (interval {low} to {high})"
    low, high = round_outward(interval, digits)
    within = max((low.removeprefix("-"), high.removeprefix("-")), key=float)
    advice = f"; use {comparison.sufficient_seeds} seeds" if comparison.sufficient_seeds else ""
    mean, low, high = _with_sign(format_decimal(interval.mean, digits)), _with_sign(low), _with_sign(high)
    if float(within) >= comparison.metric.max_difference:
        seeds = f" and {len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else ""
        reason = f"with {comparison.num_examples} examples{seeds} the interval exceeds the metric's range{advice}"
        return f"{first} and {second} are indistinguishable{seed} (difference {mean}; {reason})"
    seeds = f" with {len(comparison.seeds)} seeds" if advice else ""
    verdict = f"not significant{seeds}{advice}"
    return (
        f"{first} is within {within} {unit} of {second}{seed} (difference {mean}, interval {low} to {high}; {verdict})"
    )


def seed_clause(pair_comparisons: Sequence[PairComparison]) -> str:
    """Return the seed that all of the comparisons are about; empty if one has several seeds or needs none."""
    seeds = {comparison.single_seed for comparison in pair_comparisons}
    if None in seeds or not seeds:
        return ""
    return f" on seed {seeds.pop()}" if len(seeds) == 1 else " on one seed each"


def _with_sign(text: str) -> str:
    return f"+{text}" if float(text) > 0 else text


def _baseline_sentence(baseline: RunGroup, comparison_set: ComparisonSet) -> str:
    """Return which trained configurations differ from a baseline; empty if none was compared."""
    pairs = [
        pair
        for group in comparison_set.comparable_groups
        if group.is_trained and (pair := comparison_set.between(group, baseline)) is not None
    ]
    better = [pair for pair in pairs if pair.better_group is pair.first]
    worse = [pair for pair in pairs if pair.better_group is baseline]
    clauses = [
        _better_or_worse_clause(some, verdict) for some, verdict in ((better, "better"), (worse, "worse")) if some
    ]
    if not better and pairs:
        clauses.insert(0, _none_better_sentence(pairs, comparison_set))
    return "; ".join(clauses)


def _none_better_sentence(pair_comparisons: Sequence[PairComparison], comparison_set: ComparisonSet) -> str:
    """Return that none of the trained configurations compared with a baseline is better."""
    baseline, seed = pair_comparisons[0].second.label, seed_clause(pair_comparisons)
    if len(pair_comparisons) == sum(one.is_trained for one in comparison_set.groups):
        return f"No trained configuration is significantly better than {baseline}{seed}"
    if len(pair_comparisons) == 1:
        return (
            f"{pair_comparisons[0].first.label}, the only configuration compared with {baseline}, is not significantly "
            f"better{seed}"
        )
    return (
        f"None of the {len(pair_comparisons)} trained configurations compared with {baseline} is significantly "
        f"better{seed}"
    )


def _better_or_worse_clause(pair_comparisons: Sequence[PairComparison], direction: str) -> str:
    """Return the configurations better (or worse) than a baseline, with the smallest bound of their intervals."""
    metric, baseline = pair_comparisons[0].metric, pair_comparisons[0].second.label
    least = min(min(abs(one.interval.low), abs(one.interval.high)) for one in pair_comparisons)
    digits = max(
        metric.decimals, decimal_places(round_outward(Interval(mean=least, low=least, high=least), metric.decimals)[0])
    )
    which = (
        f"{join_with_and([one.first.label for one in pair_comparisons])} {'are' if len(pair_comparisons) > 1 else 'is'}"
    )
    by = format_decimal(least, digits, ROUND_FLOOR)
    return f"{which} {direction} than {baseline}{seed_clause(pair_comparisons)}, by {by} {metric.unit} at least"


def _interval_sentence(comparison_set: ComparisonSet) -> str:
    """Return the kind and the confidence of the intervals."""
    count = (
        f"for all {comparison_set.num_comparisons:,} comparisons simultaneously"
        if comparison_set.num_comparisons > 1
        else "for the single comparison"
    )
    how = "paired bootstrap" if comparison_set.has_bootstrap_intervals else "Student's t of paired differences"
    sentence = (
        f"Intervals have {100 * (1 - ALPHA):.3g} % confidence {count}: {how} over {comparison_set.num_examples:,} "
        "held-out examples"
    )
    single = [one for one in comparison_set.pair_comparisons if len(one.seeds) == 1]
    several = sorted({len(one.seeds) for one in comparison_set.pair_comparisons if len(one.seeds) > 1})
    if several:
        over = " to ".join(map(str, dict.fromkeys((several[0], several[-1]))))
        sentence += f" and {over} seeds together, with a variance over seeds pooled over methods"
    if single and several:
        sentence += f"; comparisons{seed_clause(single)} are over examples only"
    elif single:
        sentence += seed_clause(single)
    advice = f"; another seed may change the order: use {RECOMMENDED_SEEDS} seeds"
    return f"{sentence}{advice}" if single else sentence


def _cost_sentences(comparison_set: ComparisonSet) -> list[str]:
    """Return costs compared with full fine-tuning, and why quality is not compared."""
    trained = [one for one in comparison_set.groups if one.is_trained]
    reference = next((one for one in trained if _is_full_fine_tuning(one)), None)
    sentences = []
    if reference is not None:
        costs = (_cost_sentence(one, reference) for one in trained if one is not reference)
        sentences = _truncate_sentences([sentence for sentence in costs if sentence])
    if comparison_set.pair_comparisons:
        sentences.append(
            f"No conclusion about quality: {comparison_set.num_examples} held-out examples are too few (at least "
            f"{MIN_EXAMPLES} are needed)"
        )
    return sentences


def _cost_sentence(group: RunGroup, reference: RunGroup) -> str:
    """Return the costs only; empty if none are known."""
    if (reason := why_not_comparable(group, reference)) is not None:
        return f"{group.label} ran {reason} than {reference.label}, so costs are not compared"
    costs = cost_clause(group, reference)
    return f"{group.label} is compared with {reference.label} by costs only{costs}" if costs else ""


def _truncate_sentences(sentences: Sequence[str], num_omitted: int = 0) -> list[str]:
    """Return the first ``MAX_SENTENCES`` sentences, and the number of omitted ones."""
    num_omitted += max(len(sentences) - MAX_SENTENCES, 0)
    return [*sentences[:MAX_SENTENCES], *([f"And {num_omitted:,} more in the table"] if num_omitted else [])]
