"""Local files as examples: the readers by format, and a cache by content."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.data.example_cache import hash_data_file, load_cached_examples
from peftbench.data.readers.arrow_rows import iter_parquet_rows, read_parquet_names
from peftbench.data.readers.csv_rows import iter_csv_rows, read_csv_names
from peftbench.data.readers.json_rows import iter_json_rows, read_json_names
from peftbench.data.readers.rows import Columns, Row, SplitLocation, iter_examples
from peftbench.data.readers.text_file import COMPRESSIONS
from peftbench.errors import DataError, DataNotFoundError, EmptySplitError

if TYPE_CHECKING:
    from datasets import Dataset

Reader = Callable[[SplitLocation, Columns], Iterator[Row]]

READERS: dict[str, Reader] = {"json": iter_json_rows, "csv": iter_csv_rows, "parquet": iter_parquet_rows}
_NAME_READERS = {"json": read_json_names, "csv": read_csv_names, "parquet": read_parquet_names}
FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
"""Format by suffix of a file's name, without the suffix of a compression."""


def find_format(path: Path) -> str | None:
    """Return the format of a file by its name, e.g. ``x.jsonl.gz``; None if it has none."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind == "parquet" else kind
    return FORMATS.get(path.suffix)


def list_formats() -> str:
    """Return the suffixes that a file may have, for messages."""
    return f"{', '.join(FORMATS)} (all but .parquet also with {' or '.join(COMPRESSIONS)})"


def find_files(names: Sequence[str], described: str) -> dict[Path, str]:
    """Return the files that paths, patterns and folders name, in order, each with its format.

    The files of a pattern and of a folder (without its subfolders) are sorted by name. ``described`` is the key, for
    errors.

    Raises:
        DataNotFoundError: a path does not exist, or a pattern or folder has no such file.
        DataError: a file cannot be read or has another format.
    """
    found: dict[Path, str] = {}
    for name in names:
        path = Path(name)
        if os.path.isdir(name):  # noqa: PTH112 — Path.is_dir raises where it may not look
            members = [one for one in sorted(path.iterdir()) if find_format(one) and one.is_file()]
            if not members:
                raise DataNotFoundError(
                    f"{described}={name!r} is a folder without a file that ends in {list_formats()}",
                    "name its files, or for a copy of a data set's repository set data.source.kind=hub",
                )
        elif _is_pattern(name) and not os.path.lexists(name):
            members = [Path(one) for one in sorted(glob.glob(name, recursive=True)) if Path(one).is_file()]  # noqa: PTH207
            if not members:
                raise DataNotFoundError(f"{described}={name!r} matches no file", "correct the pattern")
        else:
            members = [path]
        for member in members:
            found[member] = _check_format(member, described)
    return found


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _check_format(path: Path, described: str) -> str:
    kind = find_format(path)
    if kind is None:
        raise DataError(
            f"{described} names {str(path)!r}, which does not end in {list_formats()}", "rename or convert it"
        )
    check_is_file(path, f"{described}={str(path)!r}")
    return kind


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

    return load_cached_examples([content, columns.cache_key], columns, read, f"reading {split}")


def check_first_example(files: Mapping[Path, str], columns: Columns, split: str) -> None:
    """Read the first example of the files.

    Raises:
        PeftbenchError: as in :func:`load_files`, if the first example shows it.
    """
    next(_iter_files(files, columns, split))


def list_faults(files: Mapping[Path, str], columns: Columns, split: str) -> list[DataError]:
    """Return what is wrong with the rows of the files, one error per faulty row, in order.

    Raises:
        DataError: a file cannot be read beyond some place; the errors of its rows before that are lost.
    """
    faults: list[DataError] = []
    for _ in _iter_files(files, columns, split, faults):
        pass
    return faults


def read_column_names(files: Mapping[Path, str], split: str) -> list[str]:
    """Return the names of the columns of the first file; those of a JSON file are names in its first objects.

    Raises:
        DataError: the file cannot be read.
        EmptySplitError: it has no columns.
    """
    path, kind = next(iter(files.items()))
    faults: list[DataError] = []  # of rows, which are reported when the rows are read
    location = SplitLocation(split, str(path), faults)
    if names := _NAME_READERS[kind](location):
        return names
    raise faults[0] if faults else location.no_examples()


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


def _iter_files(
    files: Mapping[Path, str], columns: Columns, split: str, faults: list[DataError] | None = None
) -> Iterator[Mapping[str, str]]:
    num_rows = 0

    def count(rows: Iterator[Row]) -> Iterator[Row]:
        nonlocal num_rows
        for row in rows:
            num_rows += 1
            yield row

    for path, kind in files.items():
        location = SplitLocation(split, str(path), faults)
        yield from iter_examples(count(READERS[kind](location, columns)), columns, location, num_rows)
    if not num_rows:
        raise _no_examples(list(files), split)


def _no_examples(paths: Sequence[Path], split: str) -> EmptySplitError:
    return SplitLocation(split, ", ".join(map(str, paths))).no_examples()
