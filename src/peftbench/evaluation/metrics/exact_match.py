"""Exact match of normalized texts, as in SQuAD."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import ClassVar

from peftbench.evaluation.metrics.base import TextMetric
from peftbench.record import ScoreDefinition
from peftbench.record.quality import PERCENT

_DROPPED_WORDS = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(TextMetric):
    """Equality of texts after SQuAD's normalization (Rajpurkar et al. 2016, SQuAD: 100,000+ questions for machine
    comprehension of text; its script evaluate-v1.1.py).
    """

    name: ClassVar[str] = "exact_match"
    scores: Mapping[str, ScoreDefinition] = {
        "exact_match": ScoreDefinition(
            title="exact match",
            description="Generated texts that equal the reference after SQuAD's normalization, in percent",
            unit=PERCENT,
            digits=1,
            higher_is_better=True,
            low=0,
            high=100,
        )
    }

    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        pairs = zip(generated, references, strict=True)
        return {"exact_match": tuple(100.0 * (normalize(text) == normalize(reference)) for text, reference in pairs)}


def normalize(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation, a, an and the, and repeated whitespace."""
    return " ".join(_DROPPED_WORDS.sub(" ", text.lower().translate(_PUNCTUATION)).split())
