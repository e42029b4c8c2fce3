"""Sentence splitting, for metrics and the lead baseline."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer


def split_sentences(text: str) -> list[str]:
    """Split ``text`` into sentences; a line break always ends a sentence.

    Uses the rules of Punkt (Kiss and Strunk 2006) without trained parameters, which would need a download.
    """
    lines = (line.strip() for line in text.splitlines())
    return [sentence for line in lines if line for sentence in _punkt_tokenizer().tokenize(line)]


def split_prose_sentences(text: str) -> list[str]:
    """Split wrapped prose into sentences: a blank line ends a sentence, a single line break does not."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [sentence for paragraph in paragraphs if paragraph for sentence in _punkt_tokenizer().tokenize(paragraph)]


@cache
def _punkt_tokenizer() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer()
