"""Confidence intervals: coverage, width, paired differences, and agreement with scipy and Student's t."""

from __future__ import annotations

import math
import time

import numpy
import pytest
from scipy.stats import bootstrap, norm, t

from peftbench.evaluation import intervals
from peftbench.evaluation.intervals import (
    bootstrap_interval,
    can_bootstrap,
    paired_interval,
    paired_intervals,
    t_interval,
)
from peftbench.record import Interval


def _scores(count: int, seed: int = 0) -> list[float]:
    return [float(value) for value in numpy.random.default_rng(seed).gamma(2.0, 10.0, count)]


def _width(interval: Interval) -> float:
    return interval.high - interval.low


@pytest.mark.parametrize("count", [2, 5, 40, 700])
def test_interval_contains_the_mean(count: int) -> None:
    """The interval is within the sample's range."""
    scores = _scores(count)
    interval = bootstrap_interval(scores, resamples=300)
    assert interval.mean == pytest.approx(sum(scores) / count)
    assert min(scores) <= interval.low < interval.mean < interval.high <= max(scores)


def test_interval_narrows_with_more_examples() -> None:
    """The samples are from the same distribution."""
    widths = [_width(bootstrap_interval(_scores(count), resamples=300)) for count in (10, 100, 1000)]
    assert widths[0] > widths[1] > widths[2] > 0


def test_width_matches_the_normal_approximation() -> None:
    """With many examples the interval extends 1.96 standard errors to each side."""
    scores = _scores(900)
    expected = 2 * 1.96 * float(numpy.std(scores)) / math.sqrt(len(scores))
    assert _width(bootstrap_interval(scores, resamples=2000)) == pytest.approx(expected, rel=0.15)


def test_coverage_is_about_95_percent() -> None:
    """About 95 % of 200 samples' intervals contain the mean of their distribution."""
    covered = 0
    for seed in range(200):
        interval = bootstrap_interval(_scores(60, seed), resamples=200)
        covered += interval.low <= 20.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("values", [[3.5], [3.5, 3.5], [0.0] * 50, [100.0] * 7])
def test_constant_values_have_zero_width(values: list[float]) -> None:
    """This includes a single value; no bound is NaN, and scipy does not warn."""
    interval = bootstrap_interval(values, resamples=100)
    assert (interval.mean, interval.low, interval.high) == (values[0],) * 3


def test_resampling_is_seeded() -> None:
    """The same seed gives the same interval, and another seed gives another."""
    scores = _scores(30)
    assert bootstrap_interval(scores, resamples=200) == bootstrap_interval(scores, resamples=200)
    assert bootstrap_interval(scores, resamples=200) != bootstrap_interval(scores, resamples=200, seed=1)


def test_pairing_cancels_the_difficulty_of_examples() -> None:
    """A difference of about 1 on every example is significant if paired, and is not if unpaired."""
    scores, differences = _scores(60), numpy.random.default_rng(1).normal(1.0, 0.5, 60)
    paired = paired_interval(list(differences))
    assert 0 < paired.low < paired.mean < paired.high
    first = bootstrap_interval(scores, 1000)
    second = bootstrap_interval(
        [score + difference for score, difference in zip(scores, differences, strict=True)], 1000
    )
    assert second.low < first.high


def test_weighted_interval_is_of_a_ratio_of_sums() -> None:
    """With weights, e.g. label counts, the mean is the sum of differences over the sum of weights."""
    assert paired_interval([2.0, 3.0, 4.0], [1.0, 2.0, 1.0]).mean == 9 / 4
    interval = paired_interval([3.0, 8.0] * 50, [2.0, 4.0] * 50)  # 1.5 and 2.0, so 11/6
    assert interval.mean == pytest.approx(11 / 6)
    assert 1.5 < interval.low < interval.mean < interval.high < 2.0


def test_interval_widens_with_confidence() -> None:
    """Correcting for more comparisons widens the interval, which stays within the sample's range."""
    values = [score - 20 for score in _scores(60)]
    widths = [_width(paired_interval(values, confidence=1 - 0.05 / tests)) for tests in (1, 15, 1000)]
    assert widths[0] < widths[1] < widths[2] < max(values) - min(values)


def test_t_interval_matches_hand_computed_value() -> None:
    """For 1, 2 and 3 it is 2 +- 4.303 (Student's t with 2 degrees of freedom) / sqrt(3)."""
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2.0 - interval.low == pytest.approx(interval.high - 2.0)
    assert t_interval([1.5, 1.5]) == Interval(mean=1.5, low=1.5, high=1.5)


@pytest.mark.slow
def test_false_positive_rate_is_about_5_percent() -> None:
    """Without a true difference, about 5 % of 200 intervals exclude 0; corrected for 20 comparisons, almost none do."""
    samples = [list(numpy.random.default_rng(seed).normal(size=60)) for seed in range(200)]
    plain = sum(not interval.low <= 0 <= interval.high for interval in map(paired_interval, samples))
    corrected = [paired_interval(sample, confidence=1 - 0.05 / 20) for sample in samples]
    assert 1 <= plain <= 24
    assert sum(not interval.low <= 0 <= interval.high for interval in corrected) <= 3


def test_several_pairs_give_the_intervals_of_single_pairs() -> None:
    """This holds with and without weights."""
    pairs, weights = [_scores(50, seed) for seed in range(3)], [1.0 + i % 4 for i in range(50)]
    for weight in (None, weights):
        alone = [paired_interval(one, weight) for one in pairs]
        assert [interval.low for interval in paired_intervals(pairs, weight)] == pytest.approx(
            [one.low for one in alone]
        )


def test_chunked_means_give_the_same_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the means of all pairs exceed the memory limit, every chunk of pairs uses the same resamples."""
    pairs = [_scores(30, seed) for seed in range(5)]
    one_chunk = paired_intervals(pairs)
    monkeypatch.setattr(intervals, "_MEANS_PER_CHUNK", 20_000)
    assert [one.low for one in paired_intervals(pairs)] == pytest.approx([one.low for one in one_chunk])


@pytest.mark.parametrize(("examples", "comparisons"), [(30_000, 1), (30, 5000), (2, 1), (2, 100)])
def test_student_s_t_is_used_beyond_the_resampling_limits(examples: int, comparisons: int) -> None:
    """This applies to very many examples, or to a very high confidence for the number of examples."""
    confidence, values = 1 - 0.05 / comparisons, _scores(examples)
    assert not can_bootstrap(examples, confidence)
    half_width = t.isf((1 - confidence) / 2, examples - 1) * numpy.std(values, ddof=1) / math.sqrt(examples)
    interval = paired_interval(values, confidence=confidence)
    assert (interval.low, interval.high) == pytest.approx(
        (numpy.mean(values) - half_width, numpy.mean(values) + half_width)
    )


def test_bootstrap_agrees_with_student_s_t() -> None:
    """For many examples the widths of a ratio's intervals agree within 5 %."""
    for weights in ([1.0] * 490, [1.0 + i % 9 for i in range(490)]):
        values = [score - 20 for score in _scores(490)]
        resampled, by_t = paired_interval(values, weights), paired_interval(values * 60, weights * 60)
        assert can_bootstrap(490, 0.95)
        assert not can_bootstrap(60 * 490, 0.95)
        assert _width(resampled) == pytest.approx(math.sqrt(60) * _width(by_t), rel=0.05)


def test_full_test_split_is_resampled_in_seconds() -> None:
    """The sample has CNN/DailyMail's 11,490 examples and the 15 pairs of six runs, processed in chunks."""
    values = numpy.random.default_rng(0).normal(size=(15, 11_490))
    assert can_bootstrap(11_490, 1 - 0.05 / 15)
    start = time.perf_counter()
    pair_intervals = paired_intervals(values, confidence=1 - 0.05 / 15)
    assert time.perf_counter() - start < 10
    half_width = t.isf(0.05 / 30, 11_489) / math.sqrt(11_490)
    assert [_width(one) for one in pair_intervals] == pytest.approx([2 * half_width] * 15, rel=0.08)


@pytest.mark.parametrize("weights", [None, [1.0 + i % 4 for i in range(40)]])
def test_paired_interval_matches_scipy_s_bootstrap(weights: list[float] | None) -> None:
    """Scipy's percentile bootstrap of the same ratio gives the same interval within sampling error."""
    values, weight = numpy.asarray(_scores(40)) - 20, numpy.asarray(weights or [1.0] * 40)

    def ratio(indices: numpy.ndarray, axis: int) -> numpy.ndarray:
        return values[indices].sum(axis) / weight[indices].sum(axis)  # type: ignore[no-any-return]

    expanded_quantile = t.isf(0.025, 39) * math.sqrt(40 / 39)
    scipy_interval = bootstrap(
        (numpy.arange(40),),
        ratio,
        n_resamples=10_000,
        method="percentile",
        rng=numpy.random.default_rng(1),
        confidence_level=1 - 2 * float(norm.sf(expanded_quantile)),
    ).confidence_interval
    interval = paired_interval(list(values), weights)
    assert (interval.low, interval.high) == pytest.approx(
        (scipy_interval.low, scipy_interval.high), abs=0.05 * _width(interval)
    )


def test_fewer_than_two_examples_are_not_resampled() -> None:
    """One example has no variance."""
    assert not can_bootstrap(1, 0.95)
    assert not can_bootstrap(0, 0.95)
