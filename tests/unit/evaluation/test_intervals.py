"""Bootstrap intervals: they hold the mean, narrow with more data, and have no width where nothing varies."""

from __future__ import annotations

import math
import time

import numpy
import pytest
from scipy.stats import bootstrap, norm, t

from peftbench.evaluation import intervals
from peftbench.evaluation.intervals import (
    bootstrap_interval,
    paired_interval,
    paired_intervals,
    t_interval,
    uses_bootstrap,
)
from peftbench.record import Interval


def _scores(count: int, seed: int = 0) -> list[float]:
    return [float(value) for value in numpy.random.default_rng(seed).gamma(2.0, 10.0, count)]


def _width(interval: Interval) -> float:
    return interval.high - interval.low


@pytest.mark.parametrize("count", [2, 5, 40, 700])
def test_mean_is_inside(count: int) -> None:
    """The interval is around the sample's mean, within the sample's range."""
    scores = _scores(count)
    found = bootstrap_interval(scores, resamples=300)
    assert found.mean == pytest.approx(sum(scores) / count)
    assert min(scores) <= found.low < found.mean < found.high <= max(scores)


def test_narrower_with_more_data() -> None:
    """More examples of the same kind give a narrower interval."""
    widths = [_width(bootstrap_interval(_scores(count), resamples=300)) for count in (10, 100, 1000)]
    assert widths[0] > widths[1] > widths[2] > 0


def test_width_is_that_of_a_mean() -> None:
    """With many examples the interval is the textbook's: 1.96 standard errors to either side."""
    scores = _scores(900)
    expected = 2 * 1.96 * float(numpy.std(scores)) / math.sqrt(len(scores))
    assert _width(bootstrap_interval(scores, resamples=2000)) == pytest.approx(expected, rel=0.15)


def test_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples' intervals, about 95 % hold the mean of what they were drawn from."""
    held = 0
    for seed in range(200):
        found = bootstrap_interval(_scores(60, seed), resamples=200)
        held += found.low <= 20.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


@pytest.mark.parametrize("values", [[3.5], [3.5, 3.5], [0.0] * 50, [100.0] * 7])
def test_constant_values_have_no_width(values: list[float]) -> None:
    """Equal values have an interval of no width, and one value alone has none either; no warning, no NaN."""
    found = bootstrap_interval(values, resamples=100)
    assert (found.mean, found.low, found.high) == (values[0],) * 3


def test_the_same_every_time() -> None:
    """The resampling is seeded: the same values give the same interval, another seed one a little different."""
    scores = _scores(30)
    assert bootstrap_interval(scores, resamples=200) == bootstrap_interval(scores, resamples=200)
    assert bootstrap_interval(scores, resamples=200) != bootstrap_interval(scores, resamples=200, seed=1)


def test_pairs_cancel_what_is_hard_for_both() -> None:
    """Two methods that differ by 1 on every example, give or take little, are told apart; unpaired they are not."""
    hard, noise = _scores(60), numpy.random.default_rng(1).normal(1.0, 0.5, 60)
    paired = paired_interval(list(noise))
    assert 0 < paired.low < paired.mean < paired.high
    first = bootstrap_interval(hard, 1000)
    second = bootstrap_interval([score + more for score, more in zip(hard, noise, strict=True)], 1000)
    assert second.low < first.high


def test_weights_make_a_ratio_of_sums() -> None:
    """Of losses by tokens, a difference is the sum of the ones by that of the others, as a loss is."""
    assert paired_interval([2.0, 3.0, 4.0], [1.0, 2.0, 1.0]).mean == 9 / 4
    found = paired_interval([3.0, 8.0] * 50, [2.0, 4.0] * 50)  # 1.5 and 2.0, so 11/6
    assert found.mean == pytest.approx(11 / 6)
    assert 1.5 < found.low < found.mean < found.high < 2.0


def test_more_certain_is_wider() -> None:
    """An interval that is corrected for many comparisons is wider than one that is not, and still inside the sample."""
    values = [score - 20 for score in _scores(60)]
    widths = [_width(paired_interval(values, confidence=1 - 0.05 / tests)) for tests in (1, 15, 1000)]
    assert widths[0] < widths[1] < widths[2] < max(values) - min(values)


def test_over_seeds_by_hand() -> None:
    """Of 1, 2 and 3: 2, give or take 4.303 (Student's t at 2 degrees of freedom) times 1 / sqrt(3)."""
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2.0 - found.low == pytest.approx(found.high - 2.0)
    assert t_interval([1.5, 1.5]) == Interval(mean=1.5, low=1.5, high=1.5)


def test_no_difference_is_found_as_often_as_it_says() -> None:
    """Of 200 pairs of methods that do not differ, about 5 % seem to; corrected for 20 comparisons, hardly any."""
    draws = [list(numpy.random.default_rng(seed).normal(size=60)) for seed in range(200)]
    plain = sum(not found.low <= 0 <= found.high for found in map(paired_interval, draws))
    corrected = [paired_interval(draw, confidence=1 - 0.05 / 20) for draw in draws]
    assert 1 <= plain <= 24
    assert sum(not found.low <= 0 <= found.high for found in corrected) <= 3


def test_pairs_together_are_pairs_one_by_one() -> None:
    """Several differences over the same examples have the intervals that each has alone, with weights and without."""
    pairs, weights = [_scores(50, seed) for seed in range(3)], [1.0 + i % 4 for i in range(50)]
    for weight in (None, weights):
        alone = [paired_interval(one, weight) for one in pairs]
        assert [found.low for found in paired_intervals(pairs, weight)] == pytest.approx([one.low for one in alone])


def test_in_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs whose means have no room in memory together see the same resamples one part after another."""
    pairs = [_scores(30, seed) for seed in range(5)]
    whole = paired_intervals(pairs)
    monkeypatch.setattr(intervals, "_MEANS_PER_CHUNK", 20_000)
    assert [one.low for one in paired_intervals(pairs)] == pytest.approx([one.low for one in whole])


@pytest.mark.parametrize(("examples", "comparisons"), [(30_000, 1), (30, 5000), (2, 1), (2, 100)])
def test_where_draws_say_little_it_is_t(examples: int, comparisons: int) -> None:
    """Of very many examples, or far out in the tails, it is the textbook's interval of paired differences."""
    confidence, values = 1 - 0.05 / comparisons, _scores(examples)
    assert not uses_bootstrap(examples, confidence)
    far = t.isf((1 - confidence) / 2, examples - 1) * numpy.std(values, ddof=1) / math.sqrt(examples)
    found = paired_interval(values, confidence=confidence)
    assert (found.low, found.high) == pytest.approx((numpy.mean(values) - far, numpy.mean(values) + far))


def test_both_kinds_agree_where_both_can_be() -> None:
    """Of many examples, a ratio's interval by resampling is that by t within some percent."""
    for weights in ([1.0] * 490, [1.0 + i % 9 for i in range(490)]):
        values = [score - 20 for score in _scores(490)]
        drawn, far = paired_interval(values, weights), paired_interval(values * 60, weights * 60)
        assert uses_bootstrap(490, 0.95)
        assert not uses_bootstrap(60 * 490, 0.95)
        assert _width(drawn) == pytest.approx(math.sqrt(60) * _width(far), rel=0.05)


def test_a_whole_test_split_is_resampled() -> None:
    """Of CNN/DailyMail's 11,490 examples, for every pair of six, within seconds; no batch is of the whole of it."""
    values = numpy.random.default_rng(0).normal(size=(15, 11_490))
    assert uses_bootstrap(11_490, 1 - 0.05 / 15)
    begun = time.perf_counter()
    found = paired_intervals(values, confidence=1 - 0.05 / 15)
    assert time.perf_counter() - begun < 10
    far = t.isf(0.05 / 30, 11_489) / math.sqrt(11_490)
    assert [_width(one) for one in found] == pytest.approx([2 * far] * 15, rel=0.08)


@pytest.mark.parametrize("weights", [None, [1.0 + i % 4 for i in range(40)]])
def test_resamples_are_those_of_scipy(weights: list[float] | None) -> None:
    """Of the same ratio scipy's own percentile bootstrap has the same interval, as near as another draw is."""
    values, weight = numpy.asarray(_scores(40)) - 20, numpy.asarray(weights or [1.0] * 40)

    def ratio(drawn: numpy.ndarray, axis: int) -> numpy.ndarray:
        return values[drawn].sum(axis) / weight[drawn].sum(axis)  # type: ignore[no-any-return]

    far = t.isf(0.025, 39) * math.sqrt(40 / 39)
    theirs = bootstrap(
        (numpy.arange(40),),
        ratio,
        n_resamples=10_000,
        method="percentile",
        rng=numpy.random.default_rng(1),
        confidence_level=1 - 2 * float(norm.sf(far)),
    ).confidence_interval
    ours = paired_interval(list(values), weights)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * _width(ours))


def test_one_example_has_no_interval_by_resamples() -> None:
    """There is nothing to draw from, and no degree of freedom."""
    assert not uses_bootstrap(1, 0.95)
    assert not uses_bootstrap(0, 0.95)
