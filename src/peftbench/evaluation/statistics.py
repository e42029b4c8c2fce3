"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from peftbench.record import Interval


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
        (sample,), numpy.mean, n_resamples=resamples, batch=100, method="percentile",
        rng=numpy.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean=mean, low=float(found.low), high=float(found.high))
