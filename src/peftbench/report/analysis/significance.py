"""Pairwise comparisons of groups of runs on shared examples, with simultaneous intervals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from peftbench.evaluation.intervals import can_bootstrap, paired_intervals, t_interval
from peftbench.record import Interval, RunRecord
from peftbench.report.analysis.run_groups import RunGroup, group_runs
from peftbench.report.analysis.scores import HELD_OUT_LOSS, ROUGE_L, QualityMetric, Scores, collect_scores

MIN_EXAMPLES = 20
"""Minimum number of examples for a difference to be called significant; with fewer, one outlier decides."""

MAX_GROUPS_FOR_ALL_PAIRS = 10
"""Maximum number of groups for which every pair is compared."""

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
    interval_over_examples: Interval
    """Mean over examples of first minus second, in the metric's unit, averaged over the paired seeds."""
    interval_over_seeds: Interval | None
    """The same difference over paired seeds; None with fewer than two."""
    num_seeds: int
    """Number of paired seeds; 1 if neither group trains."""
    num_examples: int
    num_comparisons: int
    """Number of comparisons corrected for, those not shown included."""

    @property
    def mean_difference(self) -> float:
        """Mean of the first minus mean of the second, in the metric's unit."""
        return self.interval_over_examples.mean

    @property
    def interval(self) -> Interval:
        """Smallest interval that contains both; it excludes zero if both do on the same side."""
        both = [self.interval_over_examples, *([self.interval_over_seeds] if self.interval_over_seeds else [])]
        return Interval(mean=self.mean_difference, low=min(one.low for one in both), high=max(one.high for one in both))

    @property
    def is_significant(self) -> bool:
        """True if the difference is significant over examples, and over seeds if there are several."""
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
        return f"{self.better_group.label} is better" if self.better_group else "not significant"


@dataclass(frozen=True, eq=False)
class ComparisonSet:
    """All pairwise comparisons of some records."""

    groups: tuple[RunGroup, ...]
    """All groups, in the order of their records."""
    metric: QualityMetric | None
    """Metric of the comparisons. Without comparisons, ROUGE-L if all groups with a known quality have it, else
    held-out loss; None if no quality is known.
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

    Runs are paired by seed and by example. The confidence of each interval is 1 - 0.05 / (number of pairs). Pairs that
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
    known = [one for one in groups if one.rouge_l_scores or one.held_out_losses]
    if not known:
        return None
    return ROUGE_L if all(one.rouge_l_scores for one in known) else HELD_OUT_LOSS


def _compare_pairs(
    groups: Sequence[RunGroup], scores_by_group: Scores, num_comparisons: int
) -> tuple[list[PairComparison], list[str]]:
    """Return the comparison of every pair, and a note for each pair without a common seed."""
    assert scores_by_group.metric is not None
    paired, unpaired_notes = [], []
    for first, second in itertools.combinations(groups, 2):
        by_seed = _differences_by_seed(first, second, scores_by_group)
        if by_seed is None:
            unpaired_notes.append(f"{first.label} and {second.label} have no common seed and are not compared")
        else:
            paired.append((first, second, by_seed))
    if not paired:
        return [], unpaired_notes
    confidence, weights = bonferroni_confidence(num_comparisons), scores_by_group.weights
    differences = numpy.stack([by_seed.mean(axis=0) for _, _, by_seed in paired])
    intervals = paired_intervals(differences, weights, confidence=confidence)
    comparisons = []
    for (first, second, by_seed), interval in zip(paired, intervals, strict=True):
        means = by_seed.sum(axis=1) / weights.sum()
        over_seeds = t_interval(list(means), confidence=confidence) if len(means) > 1 else None
        comparisons.append(
            PairComparison(
                first,
                second,
                scores_by_group.metric,
                interval,
                over_seeds,
                len(means),
                scores_by_group.num_examples,
                num_comparisons,
            )
        )
    return comparisons, unpaired_notes


def _differences_by_seed(first: RunGroup, second: RunGroup, scores_by_group: Scores) -> NDArray[numpy.float64] | None:
    """Return differences of shape (seeds, examples); None if the groups have no common seed."""
    by_group = scores_by_group.by_group_and_seed
    first_scores, second_scores = by_group[first], by_group[second]
    # A baseline does not depend on the seed: its single run is paired with every seed.
    if not first.is_trained and len(first_scores) == 1:
        (baseline,) = first_scores.values()
        return numpy.stack([baseline - score for score in second_scores.values()])
    if not second.is_trained and len(second_scores) == 1:
        (baseline,) = second_scores.values()
        return numpy.stack([score - baseline for score in first_scores.values()])
    shared = [seed for seed in first_scores if seed in second_scores]
    return numpy.stack([first_scores[seed] - second_scores[seed] for seed in shared]) if shared else None


def bonferroni_confidence(num_comparisons: int) -> float:
    """Return the confidence of each of ``num_comparisons`` simultaneous intervals at 1 - ``ALPHA`` (Bonferroni)."""
    return 1 - ALPHA / max(num_comparisons, 1)


def _swap(comparison: PairComparison) -> PairComparison:
    """Return the comparison as second minus first."""
    return PairComparison(
        comparison.second,
        comparison.first,
        comparison.metric,
        -comparison.interval_over_examples,
        -comparison.interval_over_seeds if comparison.interval_over_seeds else None,
        comparison.num_seeds,
        comparison.num_examples,
        comparison.num_comparisons,
    )
