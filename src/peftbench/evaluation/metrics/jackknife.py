"""Corpus-level scores, e.g. BLEU, as means over examples, so that intervals and paired differences need no metric."""

from __future__ import annotations

from collections.abc import Callable

import numpy
from numpy.typing import NDArray

_Array = NDArray[numpy.float64]


def compute_pseudo_values(statistics: _Array, score: Callable[[_Array], float]) -> tuple[float, ...]:
    """Return one value per example, whose mean is the score of all examples together.

    ``statistics`` (examples, k) has counts, and ``score`` takes their sums (k,) over some examples. The values are the
    jackknife's pseudo-values (Tukey 1958; Efron and Tibshirani 1993, An introduction to the bootstrap, chapter 11),
    moved so that their mean is the score: n - 1 times what the score loses without the example. To first order a
    bootstrap of their mean is a bootstrap of the score, which it would compute again from every resample.
    """
    total, count = statistics.sum(axis=0), len(statistics)
    whole = score(total)
    if count == 1:
        return (whole,)
    rows, inverse = numpy.unique(statistics, axis=0, return_inverse=True)
    without = numpy.array([score(total - row) for row in rows])[inverse.reshape(-1)]
    return tuple(float(value) for value in whole + (count - 1) * (without.mean() - without))
