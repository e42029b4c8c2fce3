"""How sure a mean is, and a difference of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from numpy.typing import ArrayLike, NDArray

from peftbench.record import Interval

Array = NDArray[numpy.float64]

MIN_RESAMPLES = 10_000
"""Of a difference, at least; the more certain its interval shall be, the more are drawn."""

MAX_RESAMPLES = 250_000
"""At most: all of their means lie in memory until their percentiles are known."""

MAX_DRAWS = 250_000_000
"""Of examples, at most, and the same ones for all pairs; so many take about two seconds."""

_DRAWS_PER_CHUNK = 4_000_000
"""Draws that lie in memory together, about, of some 24 bytes each. Of fewer the products are small and slow."""

_MEANS_PER_CHUNK = 12_500_000
"""Of resamples and pairs that lie in memory together; more pairs than that are taken one part after another."""

_MIN_TAIL_RESAMPLES = 20
"""How many resamples lie outside of an interval, at least, or its ends are one draw's chance."""


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Mean and 95 % percentile-bootstrap interval over ``values`` (Efron 1979), seeded.

    Equal values have an interval of no width. ``values`` must not be empty.
    """
    from scipy.stats import bootstrap

    sample = numpy.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) == 1 or numpy.ptp(sample) == 0:
        return Interval(mean=mean, low=mean, high=mean)
    found = bootstrap(
        (sample,),
        numpy.mean,
        vectorized=True,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=numpy.random.default_rng(seed),
    ).confidence_interval
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
    means = _ratio_of_sums(values, weight)
    if uses_bootstrap(values.shape[1], confidence):
        expanded = _expanded_confidence(values.shape[1], confidence)
        parts = math.ceil(len(values) * _required_resamples(expanded) / _MEANS_PER_CHUNK)
        ends = [_bootstrap_bounds(part, weight, expanded, seed) for part in numpy.array_split(values, parts)]
        lows, highs = map(numpy.concatenate, zip(*ends, strict=True))
    else:
        lows, highs = _t_bounds(values, weight, means, confidence)
    # What does not vary has no width; sums in floating point would give it one.
    constant = (numpy.ptp(values, axis=1) == 0) & ((numpy.ptp(weight) == 0) | (values[:, 0] == 0))
    lows, highs = numpy.where(constant, means, lows), numpy.where(constant, means, highs)
    return [Interval(mean=float(m), low=float(a), high=float(b)) for m, a, b in zip(means, lows, highs, strict=True)]


def uses_bootstrap(examples: int, confidence: float) -> bool:
    """Whether an interval over so many examples is resampled, or by Student's t.

    It is t where so few resamples would lie outside of the interval that it would take more than ``MOST_RESAMPLES``,
    and where all draws together were more than ``MOST_DRAWS``, of so many examples that their mean is as good as
    normal. Of a single example there is no interval of either kind.
    """
    if examples < 2:
        return False
    resamples = _required_resamples(_expanded_confidence(examples, confidence))
    return resamples <= MAX_RESAMPLES and examples * resamples <= MAX_DRAWS


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over seeds and its interval by Student's t: what another seed's mean may be, were there more of them.

    A bootstrap over three seeds knows three values; t says how little that is. ``values`` must be two or more.
    """
    from scipy.stats import sem, t

    mean, error = float(numpy.mean(values)), float(sem(values))
    if error == 0:
        return Interval(mean=mean, low=mean, high=mean)
    low, high = t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    return Interval(mean=mean, low=float(low), high=float(high))


def _expanded_confidence(examples: int, confidence: float) -> float:
    """The confidence at which percentiles are as far out as t is, with its standard error of a sample."""
    from scipy.stats import norm, t

    far = t.isf((1 - confidence) / 2, examples - 1) * math.sqrt(examples / (examples - 1))
    return 1 - 2 * float(norm.sf(far))


def _required_resamples(confidence: float) -> float:
    return max(MIN_RESAMPLES, math.ceil(_MIN_TAIL_RESAMPLES / (1 - confidence))) if confidence < 1 else math.inf


def _bootstrap_bounds(values: Array, weights: Array, confidence: float, seed: int) -> tuple[Array, Array]:
    """Ends (pairs,) of bootstrap intervals of ratios; which examples are drawn is what is resampled.

    scipy's bootstrap would gather the values of every pair for every draw. How often each example is drawn is the same
    for all pairs, so it is counted once, and the sums of all of them are one matrix product.
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


def _t_bounds(values: Array, weights: Array, means: Array, confidence: float) -> tuple[Array, Array]:
    """Ends (pairs,) of Student's intervals of ratios, linearised (Cochran 1977, Sampling techniques, chapter 6)."""
    from scipy.stats import sem, t

    off = (values - means[:, None] * weights) / weights.mean()
    far = t.isf((1 - confidence) / 2, values.shape[1] - 1) * sem(off, axis=1)
    return means - far, means + far


def _ratio_of_sums(values: Array, weights: Array, axis: int = -1) -> Array:
    ratio: Array = values.sum(axis) / weights.sum(axis)
    return ratio
