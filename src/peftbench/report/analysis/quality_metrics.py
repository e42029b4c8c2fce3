"""Metrics of quality by which runs are compared: held-out loss, and the scores in the records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftbench.record import PerExample, RunRecord, Score, ScoreDefinition


@dataclass(frozen=True)
class QualityMetric:
    """A score of the records, or the held-out loss. Two are equal if they have the same name."""

    score_name: str | None
    """Name of the score; None for the held-out loss."""
    definition: ScoreDefinition = field(compare=False)

    @property
    def name(self) -> str:
        """Name in sentences."""
        return self.definition.title

    @property
    def unit(self) -> str:
        """Unit of a difference."""
        return self.definition.difference_unit

    @property
    def decimals(self) -> int:
        """Default number of decimals."""
        return self.definition.digits

    @property
    def higher_is_better(self) -> bool:
        """True if a higher value is better."""
        return self.definition.higher_is_better

    @property
    def max_difference(self) -> float:
        """Largest possible difference; an interval that reaches it is uninformative."""
        if self.definition.low is None or self.definition.high is None:
            return math.inf
        return self.definition.high - self.definition.low

    def get_score(self, record: RunRecord) -> Score | None:
        """Return the score in a record; None if it has none, and for the held-out loss."""
        if record.quality is None or self.score_name is None:
            return None
        return record.quality.metrics.get(self.score_name)

    def get_value(self, record: RunRecord) -> float | None:
        """Return a run's value; None if unknown."""
        if self.score_name is None:
            return record.quality.loss if record.quality else None
        score = self.get_score(record)
        return score.interval.mean if score else None

    def get_example_values(self, per_example: PerExample) -> tuple[float, ...]:
        """Return the value of each example, of a loss the sum over its labeled tokens; empty if unknown."""
        return per_example.loss if self.score_name is None else per_example.metrics.get(self.score_name, ())


HELD_OUT_LOSS = QualityMetric(
    None, ScoreDefinition(title="held-out loss", unit="nats", digits=3, higher_is_better=False, low=0)
)


def get_headline_metric(record: RunRecord) -> QualityMetric | None:
    """Return the metric by which a run is compared; None if that is the held-out loss."""
    score = record.quality.headline_score if record.quality else None
    if record.quality is None or score is None:
        return None
    return QualityMetric(record.quality.headline_metric, score.definition)


def list_scores(records: Sequence[RunRecord]) -> list[QualityMetric]:
    """Return the scores of the records, each once, in the order of their first appearance."""
    return list(
        {
            name: QualityMetric(name, score.definition)
            for record in records
            if record.quality is not None
            for name, score in record.quality.metrics.items()
        }.values()
    )


def list_headline_metrics(records: Sequence[RunRecord]) -> list[QualityMetric]:
    """Return the headline metrics of the records, each once, in the order of their first appearance."""
    metrics = [get_headline_metric(record) for record in records]
    return list(dict.fromkeys(metric for metric in metrics if metric is not None))
