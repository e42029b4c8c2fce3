"""Scores with the definitions of peftbench's metrics."""

from __future__ import annotations

from peftbench.evaluation.metrics.registry import METRICS
from peftbench.record import Interval, Score

DEFINITIONS = {name: definition for metric in METRICS.values() for name, definition in metric.scores.items()}
"""Definition of every score, by score name."""


def build_scores(**intervals: Interval) -> dict[str, Score]:
    """Return a score with each interval, by score name."""
    return {name: Score(interval=interval, definition=DEFINITIONS[name]) for name, interval in intervals.items()}
