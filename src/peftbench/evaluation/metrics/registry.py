"""Metrics of generated text. To add one, write a module and add a row to TEXT_METRICS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftbench.evaluation.metrics.rouge import compute_rouge

TextMetric = Callable[[Sequence[str], Sequence[str]], dict[str, tuple[float, ...]]]
"""Takes generated texts and references; returns the score of each text, by score name."""

TEXT_METRICS: dict[str, TextMetric] = {"rouge": compute_rouge}
"""Name of a metric -> the function that computes its scores."""


def compute_scores(generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the scores of all metrics for each generated text, by score name."""
    scores: dict[str, tuple[float, ...]] = {}
    for compute in TEXT_METRICS.values():
        scores |= compute(generated, references)
    return scores
