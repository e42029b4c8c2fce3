"""Label prediction over the docstring corpus: which library is this docstring from?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Literal

from peftbench.data.generated import GeneratedRow, GeneratedSource, build_row

LIBRARIES = ("numpy", "pandas", "scipy", "sympy", "torch", "transformers")
"""The libraries with the most docstrings of the corpus; each is one label."""
_MAX_CHARS = 400


class DocstringLibraries(GeneratedSource):
    """Docstrings of six libraries, to be labeled with the library. A prompt is the first 400 characters."""

    kind: Literal["docstring_libraries"] = "docstring_libraries"
    """Kind of source."""

    @property
    def implied_task(self) -> str:
        return "choices"

    def iter_rows(self, split: str) -> Iterator[GeneratedRow]:
        from peftbench.data.docstring_corpus import read_pairs

        for pair in read_pairs("train"):
            if pair.package in LIBRARIES and _find_split(pair.location) == split:
                yield build_row(pair.location, _build_prompt(pair.text), f" {pair.package}", LIBRARIES, pair.package)

    def fingerprint(self, split: str | None = None) -> str:
        from peftbench.data.docstring_corpus import cache_pair_files

        content = json.dumps([cache_pair_files()[1], LIBRARIES, _MAX_CHARS])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _build_prompt(text: str) -> str:
    return f"{text[:_MAX_CHARS].rstrip()}\n\nLibrary:"


def _find_split(location: str) -> str:
    """Return the split of a docstring, by its file: docstrings of one file resemble each other."""
    file = location.partition(":")[0]
    digit = hashlib.blake2b(file.encode(), digest_size=2).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(digit, "train")
