"""How sure a mean is, and a difference of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from numpy.typing import ArrayLike, NDArray

from peftbench.record import Interval

RESAMPLES = 10_000
"""Of a difference, at least; the more certain its interval shall be, the more are drawn."""

MOST_DRAWS = 5_000_000
"""Of examples, for one difference, at most; 45 differences of so many take about a second."""

_IN_TAILS = 20
"""How many resamples lie outside of an interval, at least, or its ends are one draw's chance."""


def mean_interval(values: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Mean and 95 % percentile-bootstrap interval over ``values`` (Efron 1979), seeded.

    Equal values have an interval of no width. ``values`` must not be empty.
    """
    from scipy.stats import bootstrap

    sample = numpy.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) == 1 or numpy.ptp(sample) == 0:
        return Interval(mean=mean, low=mean, high=mean)
    found = bootstrap(
        (sample,), numpy.mean, vectorized=True, n_resamples=resamples, batch=100, method="percentile",
        rng=numpy.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean=mean, low=float(found.low), high=float(found.high))


def paired_interval(
    differences: Sequence[float], weights: Sequence[float] | None = None, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """:func:`paired_intervals` of one pair."""
    return paired_intervals([differences], weights, confidence=confidence, seed=seed)[0]


def paired_intervals(
    differences: ArrayLike, weights: ArrayLike | None = None, *, confidence: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Differences of two runs' means over the same examples, for each pair of runs, and their intervals over them.

    ``differences`` (pairs, examples) are of each example's two scores, so that what makes an example hard for both
    cancels out (the paired bootstrap of Koehn 2004, Statistical significance tests for machine translation evaluation).
    With ``weights`` (examples,), it is the sum of the differences by that of the weights: of losses, say, by tokens.

    The interval is the expanded percentile interval (Hesterberg 2015, What teachers should know about the bootstrap):
    of few examples percentiles alone are too narrow, the more so the more certain they shall be. Where
    :func:`by_bootstrap` says no, it is Student's t. All pairs see the same resamples. At least two examples.
    """
    values = numpy.asarray(differences, dtype=float)
    weight = numpy.ones(values.shape[1]) if weights is None else numpy.asarray(weights, dtype=float)
    means = _ratio(values, weight)
    if by_bootstrap(values.shape[1], confidence):
        lows, highs = _percentiles(values, weight, _expanded(values.shape[1], confidence), seed)
    else:
        lows, highs = _students(values, weight, means, confidence)
    # What does not vary has no width; sums in floating point would give it one.
    constant = (numpy.ptp(values, axis=1) == 0) & ((numpy.ptp(weight) == 0) | (values[:, 0] == 0))
    lows, highs = numpy.where(constant, means, lows), numpy.where(constant, means, highs)
    return [Interval(mean=float(m), low=float(a), high=float(b)) for m, a, b in zip(means, lows, highs, strict=True)]


def by_bootstrap(examples: int, confidence: float) -> bool:
    """Whether an interval over so many examples is resampled, or by Student's t.

    It is t where resampling would take more than ``MOST_DRAWS``: of few examples so far out in the tails that draws say
    little of them, or of so many that their mean is as good as normal.
    """
    return examples * _resamples(_expanded(examples, confidence)) <= MOST_DRAWS


def seeds_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over seeds and its interval by Student's t: what another seed's mean may be, were there more of them.

    A bootstrap over three seeds knows three values; t says how little that is. ``values`` must be two or more.
    """
    from scipy.stats import sem, t

    mean, error = float(numpy.mean(values)), float(sem(values))
    if error == 0:
        return Interval(mean=mean, low=mean, high=mean)
    low, high = t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    return Interval(mean=mean, low=float(low), high=float(high))


def _expanded(examples: int, confidence: float) -> float:
    """The confidence at which percentiles are as far out as t is, with its standard error of a sample."""
    from scipy.stats import norm, t

    far = t.isf((1 - confidence) / 2, examples - 1) * math.sqrt(examples / (examples - 1))
    return 1 - 2 * float(norm.sf(far))


def _resamples(confidence: float) -> float:
    return max(RESAMPLES, math.ceil(_IN_TAILS / (1 - confidence))) if confidence < 1 else math.inf


def _percentiles(
    values: NDArray[numpy.float64], weights: NDArray[numpy.float64], confidence: float, seed: int
) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """Ends (pairs,) of bootstrap intervals of ratios; which examples are drawn is what is resampled."""
    from scipy.stats import bootstrap

    def ratios(drawn: NDArray[numpy.int64], axis: int = -1) -> NDArray[numpy.float64]:
        return _ratio(values[:, drawn], weights[drawn], axis)

    found = bootstrap(
        (numpy.arange(len(weights)),), ratios, vectorized=True, confidence_level=confidence,
        n_resamples=int(_resamples(confidence)), batch=100, method="percentile", rng=numpy.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return found.low, found.high


def _students(
    values: NDArray[numpy.float64], weights: NDArray[numpy.float64], means: NDArray[numpy.float64], confidence: float
) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """Ends (pairs,) of Student's intervals of ratios, linearised (Cochran 1977, Sampling techniques, chapter 6)."""
    from scipy.stats import sem, t

    off = (values - means[:, None] * weights) / weights.mean()
    far = t.isf((1 - confidence) / 2, values.shape[1] - 1) * sem(off, axis=1)
    return means - far, means + far


def _ratio(values: NDArray[numpy.float64], weights: NDArray[numpy.float64], axis: int = -1) -> NDArray[numpy.float64]:
    ratio: NDArray[numpy.float64] = values.sum(axis) / weights.sum(axis)
    return ratio
