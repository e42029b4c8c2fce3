"""Bootstrap intervals: they hold the mean, narrow with more data, and have no width where nothing varies."""

from __future__ import annotations

import math

import numpy
import pytest

from peftbench.evaluation.statistics import mean_interval
from peftbench.record import Interval


def _scores(count: int, seed: int = 0) -> list[float]:
    return [float(value) for value in numpy.random.default_rng(seed).gamma(2.0, 10.0, count)]


def _width(interval: Interval) -> float:
    return interval.high - interval.low


@pytest.mark.parametrize("count", [2, 5, 40, 700])
def test_mean_is_inside(count: int) -> None:
    """The interval is around the sample's mean, within the sample's range."""
    scores = _scores(count)
    found = mean_interval(scores, resamples=300)
    assert found.mean == pytest.approx(sum(scores) / count)
    assert min(scores) <= found.low < found.mean < found.high <= max(scores)


def test_narrower_with_more_data() -> None:
    """More examples of the same kind give a narrower interval."""
    widths = [_width(mean_interval(_scores(count), resamples=300)) for count in (10, 100, 1000)]
    assert widths[0] > widths[1] > widths[2] > 0


def test_width_is_that_of_a_mean() -> None:
    """With many examples the interval is the textbook's: 1.96 standard errors to either side."""
    scores = _scores(900)
    expected = 2 * 1.96 * float(numpy.std(scores)) / math.sqrt(len(scores))
    assert _width(mean_interval(scores, resamples=2000)) == pytest.approx(expected, rel=0.15)


def test_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples' intervals, about 95 % hold the mean of what they were drawn from."""
    held = 0
    for seed in range(200):
        found = mean_interval(_scores(60, seed), resamples=200)
        held += found.low <= 20.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


@pytest.mark.parametrize("values", [[3.5], [3.5, 3.5], [0.0] * 50, [100.0] * 7])
def test_constant_values_have_no_width(values: list[float]) -> None:
    """Equal values have an interval of no width, and one value alone has none either; no warning, no NaN."""
    found = mean_interval(values, resamples=100)
    assert (found.mean, found.low, found.high) == (values[0],) * 3


def test_the_same_every_time() -> None:
    """The resampling is seeded: the same values give the same interval, another seed one a little different."""
    scores = _scores(30)
    assert mean_interval(scores, resamples=200) == mean_interval(scores, resamples=200)
    assert mean_interval(scores, resamples=200) != mean_interval(scores, resamples=200, seed=1)
