"""All metrics. To add one, write a module with a subclass of Metric and add a row to METRICS."""

from __future__ import annotations

from peftbench.evaluation.metrics.base import Metric
from peftbench.evaluation.metrics.rouge import Rouge

METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in (Rouge,)}
"""Name in ``evaluate.metrics`` -> metric."""
