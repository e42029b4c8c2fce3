"""Split texts of any script into the words that ROUGE compares."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import TYPE_CHECKING

import regex
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

if TYPE_CHECKING:
    from nltk.stem.porter import PorterStemmer

_WORD = regex.compile(
    # Scripts that write no spaces between words: each character is a word, with its combining marks.
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]\p{M}*"
    r"|[[\p{L}\p{N}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]]+",
    regex.V1,
)
_SYMBOL = regex.compile(r"\X")
_MIN_STEMMED_CHARS = 4
"""rouge_score stems words of more than three characters."""


class UnicodeTokenizer(Tokenizer):  # type: ignore[misc]
    """Splits ASCII text exactly as rouge_score does, with Porter's stemmer, and other text by Unicode's properties.

    rouge_score knows the words of a-z and 0-9 alone, so that it drops all others.
    """

    def __init__(self) -> None:
        """Prepare the tokenizer of ASCII text."""
        self._ascii_tokenizer = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text in lower case; for a text without letters and digits, its symbols."""
        if text.isascii():
            return list(self._ascii_tokenizer.tokenize(text))
        text = unicodedata.normalize("NFC", text).lower()
        words = [_stem(word) for word in _WORD.findall(text)]
        return words or [symbol for symbol in _SYMBOL.findall(text) if not symbol.isspace()]


def _stem(word: str) -> str:
    if len(word) < _MIN_STEMMED_CHARS or not (word.isascii() and word.isalnum()):
        return word
    return str(_get_stemmer().stem(word))


@cache
def _get_stemmer() -> PorterStemmer:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
