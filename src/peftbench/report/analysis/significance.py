"""Pairwise comparisons of groups of runs on shared examples, with simultaneous intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy

from peftbench.evaluation.intervals import can_bootstrap, paired_intervals
from peftbench.evaluation.seed_variance import (
    PooledVariance,
    find_sufficient_seeds,
    pool_seed_variances,
    seed_error,
    widen_by_seeds,
)
from peftbench.record import Interval, RunRecord
from peftbench.report.analysis.quality_metrics import HELD_OUT_LOSS, QualityMetric, list_headline_metrics
from peftbench.report.analysis.run_groups import RunGroup, Seed, group_runs
from peftbench.report.analysis.scores import Scores, collect_scores

MIN_EXAMPLES = 20
"""Minimum number of examples for a difference to be called significant; with fewer, one outlier decides."""

MAX_GROUPS_FOR_ALL_PAIRS = 10
"""Maximum number of groups for which every pair is compared."""

MAX_ADVISED_SEEDS = 10
"""Maximum number of seeds that is advised; a difference that needs more is small."""

_MIN_INTERVAL_EXAMPLES = 2
"""Minimum number of examples for an interval."""

ALPHA = 0.05
"""Family-wise error rate: probability of at least one false difference among all comparisons."""


@dataclass(frozen=True, eq=False)
class PairComparison:
    """Two groups compared by one metric. Intervals are simultaneous over all comparisons (Bonferroni)."""

    first: RunGroup
    second: RunGroup
    metric: QualityMetric
    interval: Interval
    """Mean of first minus mean of second, in the metric's unit: over examples and seeds, or over examples alone if
    there is one seed or neither group is trained.
    """
    seeds: tuple[Seed, ...]
    """Paired seeds; empty if neither group is trained."""
    num_examples: int
    num_comparisons: int
    """Number of comparisons corrected for, those not shown included."""
    sufficient_seeds: int | None = None
    """Number of seeds with which the interval would exclude zero; None if it does, or if more seeds do not suffice."""

    @property
    def mean_difference(self) -> float:
        """Mean of the first minus mean of the second, in the metric's unit."""
        return self.interval.mean

    @property
    def single_seed(self) -> int | None:
        """The train.seed that the comparison is about; None with several seeds or none."""
        return self.seeds[0][0] if len(self.seeds) == 1 else None

    @property
    def is_significant(self) -> bool:
        """True if the interval excludes zero and there are enough examples."""
        return self.num_examples >= MIN_EXAMPLES and self.interval.excludes_zero

    @property
    def better_group(self) -> RunGroup | None:
        """The better group; None if the difference is not significant."""
        if not self.is_significant:
            return None
        return self.first if (self.mean_difference > 0) == self.metric.higher_is_better else self.second

    @property
    def verdict(self) -> str:
        """Verdict for a table."""
        if self.num_examples < MIN_EXAMPLES:
            return "too few examples"
        seed = "" if self.single_seed is None else f" on seed {self.single_seed}"
        advice = f"; use {self.sufficient_seeds} seeds" if self.sufficient_seeds else ""
        return f"{self.better_group.label} is better{seed}" if self.better_group else f"not significant{seed}{advice}"


@dataclass(frozen=True, eq=False)
class ComparisonSet:
    """All pairwise comparisons of some records."""

    groups: tuple[RunGroup, ...]
    """All groups, in the order of their records."""
    metric: QualityMetric | None
    """Metric of the comparisons. Without comparisons, the headline metric if all groups with a known quality have the
    same, else held-out loss; None if no quality is known.
    """
    comparable_groups: tuple[RunGroup, ...]
    """Groups that can be compared, best mean first."""
    pair_comparisons: tuple[PairComparison, ...]
    exclusion_notes: tuple[str, ...]
    """One sentence per reason for an exclusion."""
    num_examples: int
    num_comparisons: int
    """Number of pairs of comparable groups, which the intervals are corrected for."""

    @property
    def has_bootstrap_intervals(self) -> bool:
        """True if the intervals over examples are bootstrap intervals, else Student's t."""
        return can_bootstrap(self.num_examples, bonferroni_confidence(self.num_comparisons))

    def between(self, first: RunGroup, second: RunGroup) -> PairComparison | None:
        """Return the comparison of two groups as ``first`` minus ``second``; None if they were not compared."""
        for pair in self.pair_comparisons:
            if (pair.first, pair.second) == (first, second):
                return pair
            if (pair.first, pair.second) == (second, first):
                return _swap(pair)
        return None


def compare_groups(records: Sequence[RunRecord]) -> ComparisonSet:
    """Compare every pair of comparable groups; with more than ten groups, only the best of each method.

    Runs are paired by seed and by example. With several seeds the interval is of other examples and other seeds, with
    one it is of that seed. The confidence of each interval is 1 - 0.05 / (number of pairs). Pairs that
    are not shown count too, because the selection uses the same metric.
    """
    groups = tuple(group_runs(records))
    scores = collect_scores(groups)
    notes, means = list(scores.exclusion_notes), {group: scores.mean(group) for group in scores.by_group_and_seed}
    metric = scores.metric if len(means) > 1 and scores.metric is not None else _select_fallback_metric(groups)
    ranked = sorted(means, key=means.__getitem__, reverse=scores.metric is None or scores.metric.higher_is_better)
    num_pairs = len(ranked) * (len(ranked) - 1) // 2
    pairs: list[PairComparison] = []
    if scores.metric is None or num_pairs == 0:
        notes.append("No conclusion about quality: no two configurations have comparable per-example scores")
    elif scores.num_examples < _MIN_INTERVAL_EXAMPLES:
        notes.append("No conclusion about quality: one held-out example gives no interval")
    else:
        selected = ranked
        if len(ranked) > MAX_GROUPS_FOR_ALL_PAIRS:
            selected = list({group.method_kind: group for group in reversed(ranked)}.values())[::-1]
            notes.append(
                f"Of {len(ranked):,} configurations only the best of each method by {scores.metric.name} are compared; "
                f"the intervals are corrected for all {num_pairs:,} pairs"
            )
        pairs, unpaired_notes = _compare_pairs(selected, scores, num_pairs)
        notes += unpaired_notes
    return ComparisonSet(groups, metric, tuple(ranked), tuple(pairs), tuple(notes), scores.num_examples, num_pairs)


def _select_fallback_metric(groups: Sequence[RunGroup]) -> QualityMetric | None:
    """Return the metric to show if no two groups are compared."""
    headlines = list_headline_metrics([run for one in groups for run in one.ok_runs])
    metrics = [*headlines, HELD_OUT_LOSS]
    known = [one for one in groups if any(one.means_by_seed(metric) for metric in metrics)]
    if not known:
        return None
    is_shared = len(headlines) == 1 and all(one.means_by_seed(headlines[0]) for one in known)
    return headlines[0] if is_shared else HELD_OUT_LOSS


def _compare_pairs(
    groups: Sequence[RunGroup], scores_by_group: Scores, num_comparisons: int
) -> tuple[list[PairComparison], list[str]]:
    """Return the comparison of every pair, and a note for each pair without a common seed."""
    assert scores_by_group.metric is not None
    paired, differences, unpaired_notes = [], [], []
    for first, second in itertools.combinations(groups, 2):
        seeds = _paired_seeds(first, second, scores_by_group)
        if not seeds:
            unpaired_notes.append(f"{first.label} and {second.label} have no common seed and are not compared")
            continue
        paired.append((first, second, seeds))
        differences.append(
            scores_by_group.mean_over_seeds(first, seeds) - scores_by_group.mean_over_seeds(second, seeds)
        )
    if not paired:
        return [], unpaired_notes
    confidence, weights = bonferroni_confidence(num_comparisons), scores_by_group.weights
    variances = {
        group: float(numpy.var(means, ddof=1))
        for group in scores_by_group.by_group_and_seed
        if group.is_trained and len(means := scores_by_group.means_by_seed(group)) > 1
    }
    intervals = paired_intervals(numpy.stack(differences), weights, confidence=confidence)
    comparisons = [
        PairComparison(
            first,
            second,
            scores_by_group.metric,
            interval,
            seeds if first.is_trained or second.is_trained else (),
            scores_by_group.num_examples,
            num_comparisons,
        )
        for (first, second, seeds), interval in zip(paired, intervals, strict=True)
    ]
    if not variances:
        return comparisons, unpaired_notes
    pooled = pool_seed_variances(
        list(variances.values()), [len(scores_by_group.by_group_and_seed[group]) for group in variances]
    )
    return [_add_seeds(one, variances, pooled, confidence) for one in comparisons], unpaired_notes


def _add_seeds(
    comparison: PairComparison, variances: Mapping[RunGroup, float], pooled: PooledVariance, confidence: float
) -> PairComparison:
    """Widen the interval over examples by the variance over seeds if there are several."""
    num_seeds, over_examples = len(comparison.seeds), comparison.interval
    if num_seeds < 2:
        return comparison
    both = (comparison.first, comparison.second)
    error = seed_error([variances[group] for group in both if group in variances], pooled, num_seeds)
    interval = widen_by_seeds(over_examples, error, pooled, confidence)
    sufficient_seeds = None
    if comparison.num_examples >= MIN_EXAMPLES and not interval.excludes_zero:
        sufficient_seeds = find_sufficient_seeds(
            over_examples, error, pooled, confidence, num_seeds=num_seeds, max_seeds=MAX_ADVISED_SEEDS
        )
    return replace(comparison, interval=interval, sufficient_seeds=sufficient_seeds)


def _paired_seeds(first: RunGroup, second: RunGroup, scores_by_group: Scores) -> tuple[Seed, ...]:
    """Return the common seeds of two groups; those of the other group if one is a baseline with a single run."""
    by_group = scores_by_group.by_group_and_seed
    for baseline, other in ((first, second), (second, first)):
        if not baseline.is_trained and len(by_group[baseline]) == 1:
            return tuple(by_group[other])
    return tuple(seed for seed in by_group[first] if seed in by_group[second])


def bonferroni_confidence(num_comparisons: int) -> float:
    """Return the confidence of each of ``num_comparisons`` simultaneous intervals at 1 - ``ALPHA`` (Bonferroni)."""
    return 1 - ALPHA / max(num_comparisons, 1)


def _swap(comparison: PairComparison) -> PairComparison:
    """Return the comparison as second minus first."""
    return replace(comparison, first=comparison.second, second=comparison.first, interval=-comparison.interval)
