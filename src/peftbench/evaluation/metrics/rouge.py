"""ROUGE: the rouge-score package as a metric of the ``evaluate`` library, with a tokenizer for texts of any script."""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import regex

from peftbench.data.sentences import split_sentences
from peftbench.evaluation.metrics.base import TextMetric
from peftbench.record import ScoreDefinition

if TYPE_CHECKING:
    from nltk.stem.porter import PorterStemmer

_TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
"""Scripts without spaces: each character is a token, with its combining marks."""
_TOKEN = regex.compile(rf"{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED}]+", regex.V1)
_SYMBOL = regex.compile(r"\X")
_MIN_STEMMED_CHARS = 4
"""rouge_score stems tokens of more than three characters."""


class Rouge(TextMetric):
    """Overlap of n-grams and longest common subsequences (Lin 2004, ROUGE: a package for automatic evaluation of
    summaries), by the rouge-score package.
    """

    name: ClassVar[str] = "rouge"
    scores: Mapping[str, ScoreDefinition] = {
        kind: ScoreDefinition(
            title=title,
            description=f"{kind} F-measure of generated text, in percent",
            unit=title,
            digits=1,
            higher_is_better=True,
            low=0,
            high=100,
        )
        for kind, title in _TITLES.items()
    }

    def import_libraries(self) -> None:
        _build_metric_class()

    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Return the F-measure of each text in percent. For rougeLsum, the texts are split into sentences."""
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
            scorer = rouge_scorer.RougeScorer(list(_TITLES), tokenizer=UnicodeTokenizer())
            pairs = zip(references, predictions, strict=True)
            scores = [scorer.score(reference, prediction) for reference, prediction in pairs]
            return {kind: [score[kind].fmeasure for score in scores] for kind in _TITLES}

    return RougeMetric


def _join_sentences_by_line(text: str) -> str:
    return "\n".join(split_sentences(text))


class UnicodeTokenizer:
    """Splits ASCII text exactly as rouge_score does, with Porter's stemmer, and other text by Unicode's properties.

    rouge_score drops every character except a-z and 0-9.
    """

    def __init__(self) -> None:
        """Prepare the tokenizer of ASCII text."""
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii_tokenizer = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text in lower case; for a text without letters and digits, its symbols."""
        if text.isascii():
            return list(self._ascii_tokenizer.tokenize(text))
        text = unicodedata.normalize("NFC", text).lower()
        tokens = [_stem(token) for token in _TOKEN.findall(text)]
        return tokens or [symbol for symbol in _SYMBOL.findall(text) if not symbol.isspace()]


def _stem(token: str) -> str:
    if len(token) < _MIN_STEMMED_CHARS or not (token.isascii() and token.isalnum()):
        return token
    return str(_get_stemmer().stem(token))


@cache
def _get_stemmer() -> PorterStemmer:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
