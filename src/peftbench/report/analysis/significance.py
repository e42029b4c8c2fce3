"""Configurations compared in pairs, on the examples that both were judged on: what differs, and what only seems to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from peftbench.evaluation.intervals import uses_bootstrap, paired_intervals, t_interval
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
    figure: QualityMetric
    over_examples: Interval
    """The first's mean less the second's, in the figure's unit, each example's averaged over the paired seeds."""
    over_seeds: Interval | None
    """The same difference over paired seeds; None where there are no two."""
    seeds: int
    """How many were paired; 1 where neither trains."""
    examples: int
    comparisons: int
    """How many were corrected for: all that could have been picked."""

    @property
    def mean(self) -> float:
        """The first's mean less the second's, in the figure's unit."""
        return self.over_examples.mean

    @property
    def interval(self) -> Interval:
        """What holds both intervals, so that it excludes zero where both do on one side."""
        both = [self.over_examples, *([self.over_seeds] if self.over_seeds else [])]
        return Interval(mean=self.mean, low=min(one.low for one in both), high=max(one.high for one in both))

    @property
    def supported(self) -> bool:
        """Whether there is a difference beyond chance: of examples, and of seeds where there were several."""
        return self.examples >= MIN_EXAMPLES and self.interval.excludes_zero

    @property
    def better(self) -> RunGroup | None:
        """Which of the two; None where that is not supported."""
        if not self.supported:
            return None
        return self.first if (self.mean > 0) == self.figure.higher_is_better else self.second

    @property
    def verdict(self) -> str:
        """What a table says of the two."""
        if self.examples < MIN_EXAMPLES:
            return "too few examples"
        return f"{self.better.label} is better" if self.better else "not significant"


@dataclass(frozen=True, eq=False)
class ComparisonSet:
    """All differences of some records."""

    every: tuple[RunGroup, ...]
    """All configurations, in the order of their records."""
    figure: QualityMetric | None
    """What quality is: what the pairs are compared by, or where there are none ROUGE-L if every configuration whose
    quality is known has it, else the held-out loss. None where no quality is known."""
    configurations: tuple[RunGroup, ...]
    """Those that can be compared, the best mean first."""
    differences: tuple[PairComparison, ...]
    unpaired: tuple[str, ...]
    """A sentence for each reason why something was not compared."""
    examples: int
    comparisons: int
    """How many pairs the configurations make, and the intervals are corrected for."""

    @property
    def bootstrapped(self) -> bool:
        """Whether the intervals over examples are of resamples; else they are Student's t."""
        return uses_bootstrap(self.examples, bonferroni_confidence(self.comparisons))

    def between(self, first: RunGroup, second: RunGroup) -> PairComparison | None:
        """The difference of two, as ``first`` less ``second``; None where they were not compared."""
        for one in self.differences:
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
    told, means = list(found.left_out), {one: found.mean(one) for one in found.by_seed}
    figure = found.figure if len(means) > 1 and found.figure is not None else _select_fallback_metric(every)
    there = sorted(means, key=means.__getitem__, reverse=found.figure is None or found.figure.higher_is_better)
    comparisons = len(there) * (len(there) - 1) // 2
    if found.figure is None or comparisons == 0:
        told.append(
            "No two configurations can be compared example by example, so that nothing is concluded about quality"
        )
        return ComparisonSet(every, figure, tuple(there), (), tuple(told), found.examples, comparisons)
    if found.examples < _MIN_INTERVAL_EXAMPLES:
        told.append(
            "Of a single held-out example nothing is concluded about quality: no interval says what chance does"
        )
        return ComparisonSet(every, figure, tuple(there), (), tuple(told), found.examples, comparisons)
    picked = there
    if len(there) > MAX_GROUPS_FOR_ALL_PAIRS:
        picked = list({one.kind: one for one in reversed(there)}.values())[::-1]
        told.append(
            f"Of {len(there):,} configurations only the best of each method by {found.figure.name} are compared; the "
            f"intervals are corrected for all {comparisons:,} pairs that could have been picked"
        )
    made, apart = _compare_pairs(picked, found, comparisons)
    return ComparisonSet(every, figure, tuple(there), tuple(made), (*told, *apart), found.examples, comparisons)


def _select_fallback_metric(every: Sequence[RunGroup]) -> QualityMetric | None:
    """By what a quality is shown where no two are compared."""
    known = [one for one in every if one.rouge_l or one.losses]
    if not known:
        return None
    return ROUGE_L if all(one.rouge_l for one in known) else HELD_OUT_LOSS


def _compare_pairs(picked: Sequence[RunGroup], found: Scores, comparisons: int) -> tuple[list[PairComparison], list[str]]:
    """The differences of every pair, and a sentence for each pair that shares no seed."""
    assert found.figure is not None
    paired, apart = [], []
    for first, second in itertools.combinations(picked, 2):
        by_seed = _differences_by_seed(first, second, found)
        if by_seed is None:
            apart.append(f"{first.label} and {second.label} have no seed in common, and are not compared")
        else:
            paired.append((first, second, by_seed))
    if not paired:
        return [], apart
    confidence, weights = bonferroni_confidence(comparisons), found.weights
    whole = numpy.stack([by_seed.mean(axis=0) for _, _, by_seed in paired])
    intervals = paired_intervals(whole, weights, confidence=confidence)
    made = []
    for (first, second, by_seed), interval in zip(paired, intervals, strict=True):
        means = by_seed.sum(axis=1) / weights.sum()
        over_seeds = t_interval(list(means), confidence=confidence) if len(means) > 1 else None
        made.append(
            PairComparison(
                first, second, found.figure, interval, over_seeds, len(means), found.examples, comparisons
            )
        )  # fmt: skip
    return made, apart


def _differences_by_seed(first: RunGroup, second: RunGroup, found: Scores) -> NDArray[numpy.float64] | None:
    """Each example's difference, (seeds, examples); None where the two have no seed in common."""
    one, other = found.by_seed[first], found.by_seed[second]
    # No seed changes what a method does that trains nothing: its run stands for every seed.
    if not first.trains and len(one) == 1:
        (alone,) = one.values()
        return numpy.stack([alone - score for score in other.values()])
    if not second.trains and len(other) == 1:
        (alone,) = other.values()
        return numpy.stack([score - alone for score in one.values()])
    shared = [seed for seed in one if seed in other]
    return numpy.stack([one[seed] - other[seed] for seed in shared]) if shared else None


def bonferroni_confidence(comparisons: int) -> float:
    """The confidence of each of so many intervals that hold all together at 1 - ``LEVEL`` (Bonferroni)."""
    return 1 - ALPHA / max(comparisons, 1)


def _swap(one: PairComparison) -> PairComparison:
    """The same, as the second less the first."""
    return PairComparison(
        one.second, one.first, one.figure, -one.over_examples,
        -one.over_seeds if one.over_seeds else None, one.seeds, one.examples, one.comparisons,
    )  # fmt: skip
