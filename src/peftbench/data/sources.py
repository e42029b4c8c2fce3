"""Sources of examples. Every source returns the columns ``id``, ``article`` and ``summary``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, field_validator

from peftbench.common.schema import PathText
from peftbench.data.base import Source
from peftbench.data.example_cache import hash_data_file
from peftbench.data.hub import Hub
from peftbench.data.local_files import FORMATS, check_first_example, check_is_file, load_files
from peftbench.data.readers.rows import Columns
from peftbench.data.synthetic import Synthetic
from peftbench.errors import EmptySplitError

if TYPE_CHECKING:
    from datasets import Dataset


class Docstrings(Source):
    """Summary lines and the rest of their docstrings: the offline default."""

    kind: Literal["docstrings"] = "docstrings"
    """Kind of source."""

    def load(self, split: str) -> Dataset:
        from peftbench.data.docstring_corpus import cache_pair_files

        paths, _ = cache_pair_files()
        return load_files({paths[split]: "json"}, Columns("article", "summary", "location"), split)

    def fingerprint(self, split: str | None = None) -> str:
        from peftbench.data.docstring_corpus import cache_pair_files

        return cache_pair_files()[1]


class Files(Source):
    """Local files, one per split."""

    kind: Literal["files"] = "files"
    """Kind of source."""
    train: PathText
    """File of the training split: .jsonl, .csv or .parquet; a relative path starts at the working directory."""
    validation: PathText | None = None
    """File of the validation split."""
    test: PathText | None = None
    """File of the test split."""
    article: str = "article"
    """Column with the text to summarize."""
    summary: str = "summary"
    """Column with the summary."""
    id: str | None = None
    """Column with the example's id; null: use the row number."""

    @field_validator("train", "validation", "test")
    @classmethod
    def _check_format(cls, value: str | None) -> str | None:
        if value is not None and Path(value).suffix not in FORMATS:
            raise ValueError(f"must be a file that ends in {', '.join(FORMATS)}, not {value!r}")
        return value

    def check(self, split: str) -> None:
        check_first_example(self._find_file(split), self._columns, split)

    def load(self, split: str) -> Dataset:
        return load_files(self._find_file(split), self._columns, split)

    def fingerprint(self, split: str | None = None) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in (self.train, self.validation, self.test) if split is None else (getattr(self, split),):
            if name is not None and os.path.isfile(name):  # noqa: PTH113 — Path.is_file raises where it may not look
                hash_data_file(digest, Path(name))
        return digest.hexdigest()

    @property
    def has_ids(self) -> bool:
        return self.id is not None

    def is_same_file(self, first: str, second: str) -> bool:
        return self.fingerprint(first) == self.fingerprint(second)

    @property
    def _columns(self) -> Columns:
        return Columns(self.article, self.summary, self.id)

    def _find_file(self, split: str) -> dict[Path, str]:
        """Return the file of a split and its format."""
        name = getattr(self, split)
        if name is None:
            raise EmptySplitError(
                f"this recipe needs a {split} split, but data.source.{split} is not set; set it to the path of a file"
            )
        check_is_file(Path(name), f"data.source.{split}={name!r}")
        return {Path(name): FORMATS[Path(name).suffix]}


SOURCES: dict[str, type[Source]] = {"docstrings": Docstrings, "files": Files, "hub": Hub, "synthetic": Synthetic}

if TYPE_CHECKING:
    AnySource = Source
else:
    AnySource = Annotated[Union[tuple(SOURCES.values())], Field(discriminator="kind")]
