"""Sources of examples: where they are. What an example is, the task defines."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, field_validator

from peftbench.common.schema import PathText
from peftbench.data.arithmetic import Arithmetic
from peftbench.data.base import Source
from peftbench.data.docstring_libraries import DocstringLibraries
from peftbench.data.example_cache import hash_data_file
from peftbench.data.hub import Hub
from peftbench.data.local_files import (
    check_first_example,
    find_files,
    find_format,
    list_faults,
    list_formats,
    load_files,
    read_column_names,
)
from peftbench.data.synthetic import Synthetic
from peftbench.errors import DataError, EmptySplitError

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.readers.rows import Columns


class Docstrings(Source):
    """Summary lines and the rest of their docstrings: the offline default."""

    kind: Literal["docstrings"] = "docstrings"
    """Kind of source."""

    @property
    def implied_task(self) -> str:
        return "summarization"

    @property
    def id_column(self) -> str:
        return "location"

    def read_column_names(self, split: str) -> list[str]:
        return read_column_names(self._find_files(split), split)

    def load(self, split: str, columns: Columns) -> Dataset:
        return load_files(self._find_files(split), columns, split)

    def fingerprint(self, split: str | None = None) -> str:
        from peftbench.data.docstring_corpus import cache_pair_files

        return cache_pair_files()[1]

    def _find_files(self, split: str) -> dict[Path, str]:
        from peftbench.data.docstring_corpus import cache_pair_files

        return {cache_pair_files()[0][split]: "json"}


PathTexts = PathText | Annotated[tuple[PathText, ...], Field(min_length=1)]
"""One path, pattern or folder, or a list of them."""


class Files(Source):
    """Local files: JSON lines, JSON, CSV or Parquet; all but Parquet also compressed (.gz, .zst)."""

    kind: Literal["files"] = "files"
    """Kind of source."""
    train: PathTexts
    """Training split: a file, a pattern (data/*.jsonl), a folder, or a list; relative to the working directory."""
    validation: PathTexts | None = None
    """Validation split, in the same form."""
    test: PathTexts | None = None
    """Test split, in the same form."""
    id: str | None = None
    """Column with the example's id; null: use the row number."""

    @field_validator("train", "validation", "test")
    @classmethod
    def _check_format(cls, value: PathTexts | None) -> PathTexts | None:
        for name in _list_paths(value):
            path = Path(name)
            if path.suffix and find_format(path) is None and not os.path.isdir(name):  # noqa: PTH112 — see find_files
                raise ValueError(f"must be a file that ends in {list_formats()}, a pattern or a folder, not {name!r}")
        return value

    def check(self, split: str, columns: Columns) -> None:
        check_first_example(self._find_files(split), columns, split)

    def list_faults(self, split: str, columns: Columns) -> list[DataError]:
        return list_faults(self._find_files(split), columns, split)

    def read_column_names(self, split: str) -> list[str]:
        return read_column_names(self._find_files(split), split)

    def load(self, split: str, columns: Columns) -> Dataset:
        return load_files(self._find_files(split), columns, split)

    def fingerprint(self, split: str | None = None) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in ("train", "validation", "test") if split is None else (split,):
            if getattr(self, name) is None:
                continue
            paths: dict[Path, str] = {}
            with suppress(DataError):  # a split that is not used may be missing
                paths = self._find_files(name)
            for path in paths:
                hash_data_file(digest, path)
        return digest.hexdigest()

    @property
    def has_ids(self) -> bool:
        return self.id is not None

    def is_same_file(self, first: str, second: str) -> bool:
        return self.fingerprint(first) == self.fingerprint(second)

    def _find_files(self, split: str) -> dict[Path, str]:
        """Return the files of a split, each with its format."""
        names = _list_paths(getattr(self, split))
        if not names:
            raise EmptySplitError(
                f"this recipe needs a {split} split, but data.source.{split} is not set; set it to the path of a file"
            )
        return find_files(names, f"data.source.{split}")


def _list_paths(value: PathTexts | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value


SOURCES: dict[str, type[Source]] = {
    "docstrings": Docstrings,
    "docstring_libraries": DocstringLibraries,
    "arithmetic": Arithmetic,
    "files": Files,
    "hub": Hub,
    "synthetic": Synthetic,
}
"""Value of ``data.source.kind``: the source's class."""

if TYPE_CHECKING:
    AnySource = Source
else:
    AnySource = Annotated[Union[tuple(SOURCES.values())], Field(discriminator="kind")]
