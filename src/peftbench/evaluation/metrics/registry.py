"""All metrics. To add one, write a module with a subclass of Metric and add a row to METRICS."""

from __future__ import annotations

from peftbench.evaluation.metrics.base import Metric
from peftbench.evaluation.metrics.bleu import Bleu
from peftbench.evaluation.metrics.choice_accuracy import ChoiceAccuracy
from peftbench.evaluation.metrics.chrf import Chrf
from peftbench.evaluation.metrics.classification import Classification
from peftbench.evaluation.metrics.exact_match import ExactMatch
from peftbench.evaluation.metrics.numeric_answer import NumericAnswer
from peftbench.evaluation.metrics.perplexity import Perplexity
from peftbench.evaluation.metrics.rouge import Rouge

METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        Rouge,
        ExactMatch,
        NumericAnswer,
        ChoiceAccuracy,
        Classification,
        Bleu,
        Chrf,
        Perplexity,
    )
}
"""Name in ``evaluate.metrics`` -> metric."""
