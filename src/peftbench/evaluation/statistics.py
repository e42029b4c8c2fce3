"""How sure a mean is, and a difference of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from peftbench.record import Interval

RESAMPLES = 10_000
"""Of a difference, at least; the more certain its interval shall be, the more are drawn."""

_IN_TAILS = 20
"""How many resamples lie outside of an interval, at least, or its ends are one draw's chance."""


def mean_interval(values: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Mean and 95 % percentile-bootstrap interval over ``values`` (Efron 1979), seeded.

    Equal values have an interval of no width. ``values`` must not be empty.
    """
    return _interval(values, [1.0] * len(values), 0.95, resamples, seed)


def paired_interval(
    differences: Sequence[float], weights: Sequence[float] | None = None, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Difference of two runs' means over the same examples, and its percentile-bootstrap interval over them.

    ``differences`` (examples,) are of each example's two scores, so that what makes an example hard for both cancels
    out (the paired bootstrap of Koehn 2004, Statistical significance tests for machine translation evaluation). With
    ``weights`` (examples,), it is the sum of the differences by that of the weights: of losses, say, by tokens.
    """
    resamples = max(RESAMPLES, math.ceil(_IN_TAILS / (1 - confidence)))
    return _interval(differences, weights or [1.0] * len(differences), confidence, resamples, seed)


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


def _interval(
    values: Sequence[float], weights: Sequence[float], confidence: float, resamples: int, seed: int
) -> Interval:
    from scipy.stats import bootstrap

    sample, weight = numpy.asarray(values, dtype=float), numpy.asarray(weights, dtype=float)
    mean = float(_ratio(sample, weight))
    if len(sample) == 1 or (numpy.ptp(sample) == 0 and numpy.ptp(weight) == 0):
        return Interval(mean=mean, low=mean, high=mean)
    found = bootstrap(
        (sample, weight), _ratio, paired=True, vectorized=True, confidence_level=confidence, n_resamples=resamples,
        batch=100, method="percentile", rng=numpy.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean=mean, low=float(found.low), high=float(found.high))


def _ratio(values: NDArray[numpy.float64], weights: NDArray[numpy.float64], axis: int = -1) -> NDArray[numpy.float64]:
    ratio: NDArray[numpy.float64] = values.sum(axis) / weights.sum(axis)
    return ratio
