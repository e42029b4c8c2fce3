"""ROUGE of each summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftbench.data.sentences import split_sentences

METRIC_DIR = Path(__file__).parent / "rouge_metric"


def compute_rouge(generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the F-measure of each summary in percent, by rouge1, rouge2, rougeL and rougeLsum."""
    import evaluate

    metric = evaluate.load(str(METRIC_DIR))
    scores = metric.compute(
        predictions=list(map(_join_sentences_by_line, generated)),
        references=list(map(_join_sentences_by_line, references)),
    )
    return {kind: tuple(100 * value for value in values) for kind, values in scores.items()}


def _join_sentences_by_line(text: str) -> str:
    return "\n".join(split_sentences(text))
