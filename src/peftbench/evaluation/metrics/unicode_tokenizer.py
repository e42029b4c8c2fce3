"""The tokenizer of ROUGE for texts of any script."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import TYPE_CHECKING

import regex
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

if TYPE_CHECKING:
    from nltk.stem.porter import PorterStemmer

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
"""Scripts without spaces: each character is a token, with its combining marks."""
_TOKEN = regex.compile(rf"{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED}]+", regex.V1)
_SYMBOL = regex.compile(r"\X")
_MIN_STEMMED_CHARS = 4
"""rouge_score stems tokens of more than three characters."""


class UnicodeTokenizer(Tokenizer):  # type: ignore[misc]
    """Splits ASCII text exactly as rouge_score does, with Porter's stemmer, and other text by Unicode's properties.

    rouge_score drops every character except a-z and 0-9.
    """

    def __init__(self) -> None:
        """Prepare the tokenizer of ASCII text."""
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
