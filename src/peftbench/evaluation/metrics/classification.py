"""Classification by generated labels: accuracy and macro-F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy
from numpy.typing import NDArray

from peftbench.errors import MetricError
from peftbench.evaluation.metrics.base import TextMetric
from peftbench.evaluation.metrics.jackknife import compute_pseudo_values
from peftbench.record import ScoreDefinition
from peftbench.record.quality import PERCENT

_MAX_LABELS = 1000
"""Maximum number of different references; with more, they are free text."""


class Classification(TextMetric):
    """Accuracy, and the mean F1 of the labels (Sokolova and Lapalme 2009, A systematic analysis of performance measures
    for classification tasks; the same as scikit-learn's ``f1_score(average="macro")`` with the references' labels).

    The labels are the references' texts. Any other generated text is wrong. Case and surrounding whitespace
    do not count.
    """

    name: ClassVar[str] = "classification"
    scores: Mapping[str, ScoreDefinition] = {
        name: ScoreDefinition(
            title=title, description=what, unit=PERCENT, digits=1, higher_is_better=True, low=0, high=100
        )
        for name, title, what in (
            ("label_accuracy", "label accuracy", "Generated labels that equal the reference, in percent"),
            ("macro_f1", "macro-F1", "Mean over the references' labels of the F1 of generated labels, in percent"),
        )
    }

    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        predicted, expected = [list(map(_normalize, texts)) for texts in (generated, references)]
        accuracy = tuple(100.0 * (one == other) for one, other in zip(predicted, expected, strict=True))
        counts = _count_labels(predicted, expected)
        return {"label_accuracy": accuracy, "macro_f1": compute_pseudo_values(counts, _compute_macro_f1)}


def _normalize(label: str) -> str:
    return " ".join(label.split()).casefold()


def _count_labels(predicted: Sequence[str], expected: Sequence[str]) -> NDArray[numpy.float64]:
    """Return (examples, 2 x labels): whether the example is a hit of each label, then its uses in both texts."""
    labels = {label: index for index, label in enumerate(sorted(set(expected)))}
    if len(labels) > _MAX_LABELS:
        raise MetricError(
            f"the metric classification needs at most {_MAX_LABELS:,} labels, and the references have {len(labels):,}",
            "use exact_match instead",
        )
    counts = numpy.zeros((len(expected), 2, len(labels)))
    for row, (one, other) in enumerate(zip(predicted, expected, strict=True)):
        counts[row, 0, labels[other]] = one == other
        counts[row, 1, labels[other]] += 1
        if one in labels:
            counts[row, 1, labels[one]] += 1
    return counts.reshape(len(expected), -1)


def _compute_macro_f1(sums: NDArray[numpy.float64]) -> float:
    """Return the mean of 2 x hits / (predictions + references) in percent; a label without either has F1 zero."""
    hits, used = sums.reshape(2, -1)
    return float(100 * (2 * hits / numpy.maximum(used, 1)).mean())
