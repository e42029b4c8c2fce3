"""ROUGE of summaries, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftbench.data.sentences import split_sentences
from peftbench.evaluation.statistics import mean_interval
from peftbench.record import Interval

METRIC = Path(__file__).parent / "rouge_metric"


def rouge(generated: Sequence[str], references: Sequence[str], resamples: int) -> dict[str, Interval]:
    """Mean F-measures in percent and their 95 % intervals over examples: rouge1, rouge2, rougeL, rougeLsum."""
    import evaluate

    metric = evaluate.load(str(METRIC))
    scores = metric.compute(predictions=list(map(_by_line, generated)), references=list(map(_by_line, references)))
    return {kind: mean_interval([100 * value for value in values], resamples) for kind, values in scores.items()}


def _by_line(text: str) -> str:
    return "\n".join(split_sentences(text))
