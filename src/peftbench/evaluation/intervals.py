"""Confidence intervals of means and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from numpy.typing import ArrayLike, NDArray

from peftbench.record import Interval

_Array = NDArray[numpy.float64]

MIN_RESAMPLES = 10_000
"""Minimum resamples for a difference; a higher confidence needs more."""

MAX_RESAMPLES = 250_000
"""Maximum resamples: all their means are in memory until the percentiles are computed."""

MAX_DRAWS = 250_000_000
"""Maximum draws of examples, shared by all pairs; this many take about two seconds."""

_DRAWS_PER_CHUNK = 4_000_000
"""Draws in memory at once, about 24 bytes each. Smaller chunks make small, slow matrix products."""

_MEANS_PER_CHUNK = 12_500_000
"""Means (resamples x pairs) in memory at once; more pairs are processed in parts."""

_MIN_TAIL_RESAMPLES = 20
"""Minimum resamples outside an interval; with fewer, its bounds depend on single draws."""


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Return the mean and the seeded 95 % percentile-bootstrap interval of ``values`` (Efron 1979).

    Equal values have an interval of zero width. ``values`` must not be empty.
    """
    from scipy.stats import bootstrap

    sample = numpy.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) == 1 or numpy.ptp(sample) == 0:
        return Interval(mean=mean, low=mean, high=mean)
    interval = bootstrap(
        (sample,),
        numpy.mean,
        vectorized=True,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=numpy.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean=mean, low=float(interval.low), high=float(interval.high))


def paired_interval(
    differences: Sequence[float], weights: Sequence[float] | None = None, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return :func:`paired_intervals` of one pair."""
    return paired_intervals([differences], weights, confidence=confidence, seed=seed)[0]


def paired_intervals(
    differences: ArrayLike, weights: ArrayLike | None = None, *, confidence: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Return, for each pair of runs, the difference of their means over the same examples, with its interval.

    ``differences`` (pairs, examples) has the difference of each example's two scores, so an example's difficulty
    cancels out (the paired bootstrap of Koehn 2004, Statistical significance tests for machine translation evaluation).
    With ``weights`` (examples,), it is the sum of differences over the sum of weights: e.g. losses by tokens.

    The interval is the expanded percentile interval (Hesterberg 2015, What teachers should know about the bootstrap):
    with few examples plain percentiles are too narrow, more so at high confidence. If
    :func:`can_bootstrap` is False, it is Student's t. All pairs use the same resamples. Needs at least two examples.
    """
    values = numpy.asarray(differences, dtype=float)
    weight = numpy.ones(values.shape[1]) if weights is None else numpy.asarray(weights, dtype=float)
    means = _ratio_of_sums(values, weight)
    if can_bootstrap(values.shape[1], confidence):
        expanded = _expanded_confidence(values.shape[1], confidence)
        parts = math.ceil(len(values) * _required_resamples(expanded) / _MEANS_PER_CHUNK)
        ends = [_bootstrap_bounds(part, weight, expanded, seed) for part in numpy.array_split(values, parts)]
        lows, highs = map(numpy.concatenate, zip(*ends, strict=True))
    else:
        lows, highs = _t_bounds(values, weight, means, confidence)
    # Constant differences have zero width; floating-point sums would give them a small one.
    constant = (numpy.ptp(values, axis=1) == 0) & ((numpy.ptp(weight) == 0) | (values[:, 0] == 0))
    lows, highs = numpy.where(constant, means, lows), numpy.where(constant, means, highs)
    return [Interval(mean=float(m), low=float(a), high=float(b)) for m, a, b in zip(means, lows, highs, strict=True)]


def can_bootstrap(examples: int, confidence: float) -> bool:
    """True if an interval over ``examples`` examples is bootstrapped, False if it is Student's t.

    Student's t is used if the bootstrap needs more than ``MAX_RESAMPLES`` resamples (few examples, high confidence) or
    more than ``MAX_DRAWS`` draws (enough examples for their mean to be normal). A single example has no interval.
    """
    if examples < 2:
        return False
    resamples = _required_resamples(_expanded_confidence(examples, confidence))
    return resamples <= MAX_RESAMPLES and examples * resamples <= MAX_DRAWS


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the mean over seeds and its Student's t interval.

    A bootstrap over three seeds resamples three values only and is too narrow. Needs at least two values.
    """
    from scipy.stats import sem, t

    mean, error = float(numpy.mean(values)), float(sem(values))
    if error == 0:
        return Interval(mean=mean, low=mean, high=mean)
    low, high = t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    return Interval(mean=mean, low=float(low), high=float(high))


def _expanded_confidence(examples: int, confidence: float) -> float:
    """Return the confidence at which percentiles are as wide as Student's t with the sample's standard error."""
    from scipy.stats import norm, t

    far = t.isf((1 - confidence) / 2, examples - 1) * math.sqrt(examples / (examples - 1))
    return 1 - 2 * float(norm.sf(far))


def _required_resamples(confidence: float) -> float:
    return max(MIN_RESAMPLES, math.ceil(_MIN_TAIL_RESAMPLES / (1 - confidence))) if confidence < 1 else math.inf


def _bootstrap_bounds(values: _Array, weights: _Array, confidence: float, seed: int) -> tuple[_Array, _Array]:
    """Return the bounds (pairs,) of bootstrap intervals of ratios, from resampled examples.

    scipy's bootstrap gathers the values of every pair for every draw. Here the number of times each example is drawn is
    counted once for all pairs, and all sums are one matrix product.
    """
    count, random = len(weights), numpy.random.default_rng(seed)
    columns, at_once = numpy.column_stack([values.T, weights]), max(1, _DRAWS_PER_CHUNK // len(weights))
    drawn = []
    for left in range(int(_required_resamples(confidence)), 0, -at_once):
        rows = min(at_once, left)
        places = random.integers(count, size=(rows, count)) + count * numpy.arange(rows)[:, None]
        times = numpy.bincount(places.ravel(), minlength=rows * count).reshape(rows, count)
        sums = times.astype(float) @ columns
        drawn.append(sums[:, :-1] / sums[:, -1:])
    tail = (1 - confidence) / 2
    low, high = numpy.quantile(numpy.concatenate(drawn), [tail, 1 - tail], axis=0)
    return low, high


def _t_bounds(values: _Array, weights: _Array, means: _Array, confidence: float) -> tuple[_Array, _Array]:
    """Return the bounds (pairs,) of Student's t intervals of linearized ratios (Cochran 1977, chapter 6)."""
    from scipy.stats import sem, t

    off = (values - means[:, None] * weights) / weights.mean()
    far = t.isf((1 - confidence) / 2, values.shape[1] - 1) * sem(off, axis=1)
    return means - far, means + far


def _ratio_of_sums(values: _Array, weights: _Array, axis: int = -1) -> _Array:
    ratio: _Array = values.sum(axis) / weights.sum(axis)
    return ratio
