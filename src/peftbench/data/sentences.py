"""Sentences, as ROUGE-Lsum and the lead baseline need them."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer


def split_sentences(text: str) -> list[str]:
    """Sentences of ``text``; a line break always ends one.

    Punkt (Kiss and Strunk 2006) with its rules alone: the trained parameters would have to be downloaded.
    """
    lines = (line.strip() for line in text.splitlines())
    return [sentence for line in lines if line for sentence in _punkt_tokenizer().tokenize(line)]


def split_prose_sentences(text: str) -> list[str]:
    """Sentences of running text: a blank line ends one, a line break is only where the line was full."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [sentence for paragraph in paragraphs if paragraph for sentence in _punkt_tokenizer().tokenize(paragraph)]


@cache
def _punkt_tokenizer() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer()
