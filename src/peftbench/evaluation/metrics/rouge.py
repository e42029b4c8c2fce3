"""ROUGE of each summary: the rouge-score package as a metric of the ``evaluate`` library."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from typing import Any

from peftbench.data.sentences import split_sentences

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def compute_rouge(generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the F-measure of each summary in percent, by rouge1, rouge2, rougeL and rougeLsum.

    For rougeLsum, the texts are split into sentences.
    """
    # The library creates a folder for its cache, and in memory it writes nothing there: two runs share no file.
    with tempfile.TemporaryDirectory() as folder:
        metric = _build_metric_class()(keep_in_memory=True, cache_dir=folder)
        scores = metric.compute(
            predictions=list(map(_join_sentences_by_line, generated)),
            references=list(map(_join_sentences_by_line, references)),
        )
    return {kind: tuple(100 * value for value in values) for kind, values in scores.items()}


@cache
def _build_metric_class() -> Any:  # noqa: ANN401 — evaluate has no types
    """Return the metric's class; importing its libraries takes seconds."""
    import datasets
    import evaluate
    from rouge_score import rouge_scorer

    from peftbench.evaluation.metrics.unicode_tokenizer import UnicodeTokenizer

    class RougeMetric(evaluate.Metric):  # type: ignore[misc]
        """Computes, for each type of ROUGE, one F-measure (0 to 1) per example."""

        def _info(self) -> evaluate.MetricInfo:
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="ROUGE (Lin 2004): overlap of n-grams and longest common subsequences.",
                citation="Lin 2004, ROUGE: a package for automatic evaluation of summaries.",
                features=datasets.Features({"predictions": text, "references": text}),
            )

        def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
            scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, tokenizer=UnicodeTokenizer())
            pairs = zip(references, predictions, strict=True)
            scores = [scorer.score(reference, prediction) for reference, prediction in pairs]
            return {kind: [score[kind].fmeasure for score in scores] for kind in ROUGE_TYPES}

    return RougeMetric


def _join_sentences_by_line(text: str) -> str:
    return "\n".join(split_sentences(text))
