"""Local files as examples: the readers by format, and a cache by content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.data.example_cache import hash_data_file, load_cached_examples
from peftbench.data.readers.arrow_rows import iter_parquet_rows
from peftbench.data.readers.csv_rows import iter_csv_rows
from peftbench.data.readers.json_rows import iter_json_rows
from peftbench.data.readers.rows import Columns, Row, SplitLocation, iter_examples
from peftbench.errors import DataError, DataNotFoundError, EmptySplitError

if TYPE_CHECKING:
    from datasets import Dataset

Reader = Callable[[SplitLocation, Columns], Iterator[Row]]

READERS: dict[str, Reader] = {"json": iter_json_rows, "csv": iter_csv_rows, "parquet": iter_parquet_rows}
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Format by suffix of a file's name."""


def load_files(files: Mapping[Path, str], columns: Columns, split: str) -> Dataset:
    """Return the examples of one or more files, each given with its format, in order.

    Raises:
        DataError: a file cannot be read, or a cell is not text.
        MissingColumnError: a file lacks a used column.
        EmptySplitError: the files have no examples.
        OutputError: the cache cannot be written.
    """
    states = [path.stat() for path in files]
    content = [[kind, hash_content(path)] for path, kind in files.items()]

    def read() -> Iterator[Mapping[str, str]]:
        yield from _iter_files(files, columns, split)
        # The key is the hash of the earlier content.
        for path, before in zip(files, states, strict=True):
            after = path.stat()
            if (before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
                after.st_ino,
                after.st_size,
                after.st_mtime_ns,
                after.st_ctime_ns,
            ):
                raise DataError(f"{path} changed while it was read", "run again")

    return load_cached_examples([content, columns.names], read, f"reading {split}")


def check_first_example(files: Mapping[Path, str], columns: Columns, split: str) -> None:
    """Read the first example of the files.

    Raises:
        PeftbenchError: as in :func:`load_files`, if the first example shows it.
    """
    next(_iter_files(files, columns, split))


def hash_content(path: Path) -> str:
    """Return the hash of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    hash_data_file(digest, path)
    return digest.hexdigest()


def check_is_file(path: Path, described: str) -> None:
    """Check that ``path`` is a file that this user may read; ``described`` is the key and its value.

    Raises:
        DataNotFoundError: it does not exist.
        DataError: it is a folder or cannot be read.
    """
    advice = "set it to the path of a local file"
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise DataNotFoundError(
                f"{described} is a link to {path.readlink()}, which does not exist", "correct the link"
            ) from error
        raise DataNotFoundError(f"{described} does not exist (tried {path.absolute()})", advice) from error
    except OSError as error:
        raise DataError(f"{described} cannot be read: {error.strerror or error}", advice) from error
    except ValueError as error:  # a NUL in the name
        raise DataNotFoundError(f"{described} does not exist: {error}", advice) from error
    if stat.S_ISDIR(mode):
        raise DataError(
            f"{described} is a folder", f"{advice}; for a folder, set data.source.kind=hub and data.source.path"
        )
    if not stat.S_ISREG(mode):
        raise DataError(f"{described} is a pipe or a device, which cannot be read twice", advice)
    if not os.access(path, os.R_OK):
        raise DataError(f"{described} cannot be read: Permission denied", "change its permissions")


def _iter_files(files: Mapping[Path, str], columns: Columns, split: str) -> Iterator[Mapping[str, str]]:
    index = 0
    for path, kind in files.items():
        location = SplitLocation(split, str(path))
        for example in iter_examples(READERS[kind](location, columns), columns, location, index):
            index += 1
            yield example
    if not index:
        raise _no_examples(list(files), split)


def _no_examples(paths: Sequence[Path], split: str) -> EmptySplitError:
    return SplitLocation(split, ", ".join(map(str, paths))).no_examples()
