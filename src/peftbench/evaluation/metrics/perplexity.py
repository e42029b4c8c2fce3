"""Perplexity of the references, from the held-out loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy
from numpy.typing import NDArray

from peftbench.evaluation.metrics.base import LossMetric
from peftbench.evaluation.metrics.jackknife import compute_pseudo_values
from peftbench.record import ScoreDefinition


class Perplexity(LossMetric):
    """Exponential of the mean cross-entropy of the labeled tokens (Jelinek et al. 1977, Perplexity: a measure of the
    difficulty of speech recognition tasks). It depends on the tokenizer.
    """

    name: ClassVar[str] = "perplexity"
    scores: Mapping[str, ScoreDefinition] = {
        "perplexity": ScoreDefinition(
            title="perplexity",
            description="Exponential of the held-out loss",
            unit="perplexity",
            digits=2,
            higher_is_better=False,
            low=1,
        )
    }

    def compute_from_losses(
        self, losses: Sequence[float], labeled_tokens: Sequence[int]
    ) -> dict[str, tuple[float, ...]]:
        statistics = numpy.column_stack([losses, labeled_tokens])
        return {"perplexity": compute_pseudo_values(statistics, _compute_perplexity)}


_MAX_LOSS = 700.0
"""Loss in nats up to which the exponential is a float; a larger one counts as this."""


def _compute_perplexity(sums: NDArray[numpy.float64]) -> float:
    return math.exp(min(sums[0] / sums[1], _MAX_LOSS))
