"""Variance over seeds: pooling, degrees of freedom, and intervals over examples and seeds."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy.stats import t

from peftbench.evaluation.intervals import t_interval
from peftbench.evaluation.seed_variance import (
    PooledVariance,
    find_sufficient_seeds,
    pool_seed_variances,
    seed_error,
    widen_by_seeds,
)
from peftbench.record import Interval

NO_EXAMPLES = Interval(mean=2.0, low=2.0, high=2.0)


def test_equal_variances_have_the_degrees_of_freedom_of_all_methods() -> None:
    """Four methods with three seeds have eight; one that varies alone has its own two."""
    assert pool_seed_variances([2.0] * 4, [3] * 4) == PooledVariance(2.0, 8.0)
    assert pool_seed_variances([2.0, 0.0, 0.0, 0.0], [3] * 4) == PooledVariance(0.5, 2.0)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e200])
def test_degrees_of_freedom_match_welch_s_test(scale: float) -> None:
    """Those of two methods with equally many seeds are Welch's, whatever the unit of the variances."""
    expected = (3 / 4 + 1 / 4) ** 2 / ((3 / 4) ** 2 / 3 + (1 / 4) ** 2 / 3)
    assert pool_seed_variances([3 * scale, scale], [4, 4]).degrees_of_freedom == pytest.approx(expected)


def test_equal_scores_in_all_seeds_add_no_variance() -> None:
    """The interval stays that over examples."""
    pooled = pool_seed_variances([0.0, 0.0], [2, 3])
    over_examples = Interval(mean=1.0, low=-1.0, high=4.0)
    assert pooled == PooledVariance(0.0, 3.0)
    assert widen_by_seeds(over_examples, seed_error([0.0, 0.0], pooled, 2), pooled, 0.95) == over_examples


def test_seed_error_is_the_larger_of_own_and_pooled() -> None:
    """A baseline has no variance, so one method counts once."""
    pooled = PooledVariance(4.0, 6.0)
    assert seed_error([1.0, 2.0], pooled, 2) == 2.0
    assert seed_error([9.0, 1.0], pooled, 2) == math.sqrt(5.0)
    assert seed_error([1.0], pooled, 4) == 1.0


def test_one_varying_method_without_variance_of_examples_gives_student_s_t() -> None:
    """The interval of a method and a baseline is that of the method's mean over seeds."""
    means = [1.0, 2.0, 3.0]
    variance = float(numpy.var(means, ddof=1))
    pooled = pool_seed_variances([variance], [3])
    interval = widen_by_seeds(NO_EXAMPLES, seed_error([variance], pooled, 3), pooled, 0.95)
    expected = t_interval(means)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_each_end_is_widened_on_its_own() -> None:
    """An asymmetric interval over examples stays asymmetric."""
    pooled = PooledVariance(1.0, 5.0)
    error = 4.0 / float(t.isf(0.025, 5))
    interval = widen_by_seeds(Interval(mean=10.0, low=7.0, high=15.0), error, pooled, 0.95)
    assert interval.mean == 10.0
    assert interval.low == pytest.approx(10 - 5)
    assert interval.high == pytest.approx(10 + math.hypot(5, 4))


def test_sufficient_seeds_are_the_first_that_exclude_zero() -> None:
    """Check the number against the half-width by hand; a wide interval over examples needs more examples instead."""
    pooled, error = PooledVariance(1.0, 1.0), 1.0
    over_examples = Interval(mean=2.0, low=1.5, high=2.5)

    def find(max_seeds: int) -> int | None:
        return find_sufficient_seeds(over_examples, error, pooled, 0.95, num_seeds=2, max_seeds=max_seeds)

    half_widths = {n: math.hypot(0.5, t.isf(0.025, n - 1) * math.sqrt(2 / n)) for n in range(3, 11)}
    expected = min(count for count, half_width in half_widths.items() if half_width < 2)
    assert find(10) == expected
    assert find(expected - 1) is None
    around_zero = Interval(mean=2.0, low=-0.1, high=4.1)
    assert find_sufficient_seeds(around_zero, error, pooled, 0.95, num_seeds=2, max_seeds=10) is None
