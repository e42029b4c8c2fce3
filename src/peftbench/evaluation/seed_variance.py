"""Variance of mean scores over seeds, and intervals of differences over examples and seeds together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftbench.record import Interval


@dataclass(frozen=True)
class PooledVariance:
    """Variance over seeds of a method's mean score, averaged over the methods of a suite."""

    variance: float
    degrees_of_freedom: float
    """Satterthwaite's, between (seeds - 1) if one method causes all of it and methods x (seeds - 1)."""

    def scale_to_seeds(self, num_seeds: int, more_seeds: int) -> PooledVariance:
        """Return the same variance as if it was estimated from ``more_seeds`` seeds instead of ``num_seeds``."""
        return PooledVariance(self.variance, self.degrees_of_freedom * (more_seeds - 1) / (num_seeds - 1))


def pool_seed_variances(variances: Sequence[float], seed_counts: Sequence[int]) -> PooledVariance:
    """Return the mean of the methods' variances over seeds, with its degrees of freedom.

    Each method has a variance and at least two seeds. The degrees of freedom are those of a sum of independent mean
    squares (Satterthwaite 1946, An approximate distribution of estimates of variance components): they are few if one
    method varies much more than the others.
    """
    largest = max(variances)
    if largest == 0:
        return PooledVariance(0.0, float(sum(count - 1 for count in seed_counts)))
    relative = [variance / largest for variance in variances]  # squares of tiny variances would underflow
    squares = sum(one**2 / (count - 1) for one, count in zip(relative, seed_counts, strict=True))
    return PooledVariance(sum(variances) / len(variances), sum(relative) ** 2 / squares)


def seed_error(variances: Sequence[float], pooled: PooledVariance, num_seeds: int) -> float:
    """Return the standard error over seeds of the difference of two methods' means.

    ``variances`` has the variance over seeds of each of the two that is trained. A method that varies more than the
    average counts with its own variance.
    """
    return math.sqrt(max(sum(variances), len(variances) * pooled.variance) / num_seeds)


def widen_by_seeds(over_examples: Interval, error: float, pooled: PooledVariance, confidence: float) -> Interval:
    """Return an interval over examples and seeds from one over examples and the standard error over seeds.

    The squares of the two half-widths add (Banerjee 1960, Approximate confidence interval for linear functions of means
    of k populations when the population variances are not equal), so the interval covers for any ratio of the two
    variances. Each end has its own half-width, because bootstrap intervals are asymmetric (Zou and Donner 2008,
    Construction of confidence limits about effect measures).
    """
    from scipy.stats import t

    mean = over_examples.mean
    seed_part = float(t.isf((1 - confidence) / 2, pooled.degrees_of_freedom)) * error
    return Interval(
        mean=mean,
        low=mean - math.hypot(mean - over_examples.low, seed_part),
        high=mean + math.hypot(over_examples.high - mean, seed_part),
    )


def find_sufficient_seeds(
    over_examples: Interval, error: float, pooled: PooledVariance, confidence: float, *, num_seeds: int, max_seeds: int
) -> int | None:
    """Return the smallest number of seeds, above ``num_seeds``, with which the interval would exclude zero.

    It assumes the same difference and the same variances. None if ``max_seeds`` are too few, e.g. because the interval
    over examples contains zero.
    """
    if not over_examples.excludes_zero:
        return None
    for count in range(num_seeds + 1, max_seeds + 1):
        scaled = pooled.scale_to_seeds(num_seeds, count)
        if widen_by_seeds(over_examples, error * math.sqrt(num_seeds / count), scaled, confidence).excludes_zero:
            return count
    return None
