"""Configurations compared in pairs, on the examples that both were judged on: what differs, and what only seems to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from peftbench.evaluation.intervals import paired_intervals, t_interval, uses_bootstrap
from peftbench.record import Interval, RunRecord
from peftbench.report.analysis.run_groups import RunGroup, group_runs
from peftbench.report.analysis.scores import HELD_OUT_LOSS, ROUGE_L, QualityMetric, Scores, collect_scores

MIN_EXAMPLES = 20
"""Of fewer a mean is not yet distributed as an interval takes it to be, and one odd example can make a difference."""

MAX_GROUPS_FOR_ALL_PAIRS = 10
"""Configurations, of which every pair is compared. More are as many pairs as nobody reads."""

_MIN_INTERVAL_EXAMPLES = 2
"""Examples: one alone does not vary."""

ALPHA = 0.05
"""How often, at most, chance alone makes any of all comparisons seem to be a difference."""


@dataclass(frozen=True, eq=False)
class PairComparison:
    """Two configurations on one figure. Its intervals hold for all comparisons together (Bonferroni)."""

    first: RunGroup
    second: RunGroup
    metric: QualityMetric
    interval_over_examples: Interval
    """The first's mean less the second's, in the figure's unit, each example's averaged over the paired seeds."""
    interval_over_seeds: Interval | None
    """The same difference over paired seeds; None where there are no two."""
    num_seeds: int
    """How many were paired; 1 where neither trains."""
    num_examples: int
    num_comparisons: int
    """How many were corrected for: all that could have been picked."""

    @property
    def mean_difference(self) -> float:
        """The first's mean less the second's, in the figure's unit."""
        return self.interval_over_examples.mean

    @property
    def interval(self) -> Interval:
        """What holds both intervals, so that it excludes zero where both do on one side."""
        both = [self.interval_over_examples, *([self.interval_over_seeds] if self.interval_over_seeds else [])]
        return Interval(mean=self.mean_difference, low=min(one.low for one in both), high=max(one.high for one in both))

    @property
    def is_significant(self) -> bool:
        """Whether there is a difference beyond chance: of examples, and of seeds where there were several."""
        return self.num_examples >= MIN_EXAMPLES and self.interval.excludes_zero

    @property
    def better_group(self) -> RunGroup | None:
        """Which of the two; None where that is not supported."""
        if not self.is_significant:
            return None
        return self.first if (self.mean_difference > 0) == self.metric.higher_is_better else self.second

    @property
    def verdict(self) -> str:
        """What a table says of the two."""
        if self.num_examples < MIN_EXAMPLES:
            return "too few examples"
        return f"{self.better_group.label} is better" if self.better_group else "not significant"


@dataclass(frozen=True, eq=False)
class ComparisonSet:
    """All differences of some records."""

    groups: tuple[RunGroup, ...]
    """All configurations, in the order of their records."""
    metric: QualityMetric | None
    """What quality is: what the pairs are compared by, or where there are none ROUGE-L if every configuration whose
    quality is known has it, else the held-out loss. None where no quality is known."""
    comparable_groups: tuple[RunGroup, ...]
    """Those that can be compared, the best mean first."""
    pair_comparisons: tuple[PairComparison, ...]
    exclusion_notes: tuple[str, ...]
    """A sentence for each reason why something was not compared."""
    num_examples: int
    num_comparisons: int
    """How many pairs the configurations make, and the intervals are corrected for."""

    @property
    def uses_bootstrap(self) -> bool:
        """Whether the intervals over examples are of resamples; else they are Student's t."""
        return uses_bootstrap(self.num_examples, bonferroni_confidence(self.num_comparisons))

    def between(self, first: RunGroup, second: RunGroup) -> PairComparison | None:
        """The difference of two, as ``first`` less ``second``; None where they were not compared."""
        for one in self.pair_comparisons:
            if (one.first, one.second) == (first, second):
                return one
            if (one.first, one.second) == (second, first):
                return _swap(one)
        return None


def compare_groups(records: Sequence[RunRecord]) -> ComparisonSet:
    """Every pair of configurations that can be compared; of more than ten, the best of each method against each other.

    Runs are paired by their seeds, and example by example. The confidence of each interval is 1 - 0.05 by the number of
    pairs that there are, also of those that were not picked, since the picking went by the same figure.
    """
    every = tuple(group_runs(records))
    found = collect_scores(every)
    told, means = list(found.exclusion_notes), {one: found.mean(one) for one in found.by_group_and_seed}
    figure = found.metric if len(means) > 1 and found.metric is not None else _select_fallback_metric(every)
    there = sorted(means, key=means.__getitem__, reverse=found.metric is None or found.metric.higher_is_better)
    comparisons = len(there) * (len(there) - 1) // 2
    if found.metric is None or comparisons == 0:
        told.append(
            "No two configurations can be compared example by example, so that nothing is concluded about quality"
        )
        return ComparisonSet(every, figure, tuple(there), (), tuple(told), found.num_examples, comparisons)
    if found.num_examples < _MIN_INTERVAL_EXAMPLES:
        told.append(
            "Of a single held-out example nothing is concluded about quality: no interval says what chance does"
        )
        return ComparisonSet(every, figure, tuple(there), (), tuple(told), found.num_examples, comparisons)
    picked = there
    if len(there) > MAX_GROUPS_FOR_ALL_PAIRS:
        picked = list({one.method_kind: one for one in reversed(there)}.values())[::-1]
        told.append(
            f"Of {len(there):,} configurations only the best of each method by {found.metric.name} are compared; the "
            f"intervals are corrected for all {comparisons:,} pairs that could have been picked"
        )
    made, apart = _compare_pairs(picked, found, comparisons)
    return ComparisonSet(every, figure, tuple(there), tuple(made), (*told, *apart), found.num_examples, comparisons)


def _select_fallback_metric(groups: Sequence[RunGroup]) -> QualityMetric | None:
    """By what a quality is shown where no two are compared."""
    known = [one for one in groups if one.rouge_l_scores or one.held_out_losses]
    if not known:
        return None
    return ROUGE_L if all(one.rouge_l_scores for one in known) else HELD_OUT_LOSS


def _compare_pairs(
    groups: Sequence[RunGroup], scores_by_group: Scores, num_comparisons: int
) -> tuple[list[PairComparison], list[str]]:
    """The differences of every pair, and a sentence for each pair that shares no seed."""
    assert scores_by_group.metric is not None
    paired, apart = [], []
    for first, second in itertools.combinations(groups, 2):
        by_seed = _differences_by_seed(first, second, scores_by_group)
        if by_seed is None:
            apart.append(f"{first.label} and {second.label} have no seed in common, and are not compared")
        else:
            paired.append((first, second, by_seed))
    if not paired:
        return [], apart
    confidence, weights = bonferroni_confidence(num_comparisons), scores_by_group.weights
    whole = numpy.stack([by_seed.mean(axis=0) for _, _, by_seed in paired])
    intervals = paired_intervals(whole, weights, confidence=confidence)
    made = []
    for (first, second, by_seed), interval in zip(paired, intervals, strict=True):
        means = by_seed.sum(axis=1) / weights.sum()
        over_seeds = t_interval(list(means), confidence=confidence) if len(means) > 1 else None
        made.append(
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
    return made, apart


def _differences_by_seed(first: RunGroup, second: RunGroup, scores_by_group: Scores) -> NDArray[numpy.float64] | None:
    """Each example's difference, (seeds, examples); None where the two have no seed in common."""
    one, other = scores_by_group.by_group_and_seed[first], scores_by_group.by_group_and_seed[second]
    # No seed changes what a method does that trains nothing: its run stands for every seed.
    if not first.is_trained and len(one) == 1:
        (alone,) = one.values()
        return numpy.stack([alone - score for score in other.values()])
    if not second.is_trained and len(other) == 1:
        (alone,) = other.values()
        return numpy.stack([score - alone for score in one.values()])
    shared = [seed for seed in one if seed in other]
    return numpy.stack([one[seed] - other[seed] for seed in shared]) if shared else None


def bonferroni_confidence(num_comparisons: int) -> float:
    """The confidence of each of so many intervals that hold all together at 1 - ``LEVEL`` (Bonferroni)."""
    return 1 - ALPHA / max(num_comparisons, 1)


def _swap(comparison: PairComparison) -> PairComparison:
    """The same, as the second less the first."""
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
