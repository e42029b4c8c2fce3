"""Cache of examples on disk. Its key is the content that was read, so a replaced file never gives old rows.

The examples are in an Arrow file that is memory-mapped, in the cache folder of the library ``datasets``. What that
library derives from them (an encoding, a permutation) is in the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from peftbench.common.filesystem import open_atomically, write_error
from peftbench.common.fingerprint import hash_file
from peftbench.errors import DataError, OutputError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

    from peftbench.data.readers.rows import Columns

_CACHE_VERSION = 2  # part of the cache's key: increase it when the reading of files changes
_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 1 << 24
CACHE_HINT = "set HF_HOME or HF_DATASETS_CACHE to a folder that can be written"


def load_cached_examples(
    key: Sequence[object],
    columns: Columns,
    read_examples: Callable[[], Iterable[Mapping[str, str]]],
    description: str,
) -> Dataset:
    """Return the examples stored under ``key``; read and store them first if there are none.

    Several processes may do this at once: each writes a file of its own, and the first one stays.

    Raises:
        DataError: an example cannot be read.
        OutputError: the cache cannot be written.
    """
    from datasets import config

    text = json.dumps([_CACHE_VERSION, *key])
    fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    path = Path(config.HF_DATASETS_CACHE) / "peftbench" / fingerprint / "examples.arrow"
    dataset = _open_examples(path, fingerprint)
    if dataset is None:
        _write_examples(path, ["id", *columns.named], read_examples(), description)
        dataset = _open_examples(path, fingerprint)
        assert dataset is not None
    return dataset


def hash_data_file(digest: hashlib.blake2b, path: Path) -> None:
    """Add the bytes of a file to ``digest``.

    Raises:
        DataError: it cannot be read.
    """
    try:
        hash_file(digest, path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", "check the path and its permissions"
        ) from error


def dataset_cache_dir(dataset: Dataset) -> Path:
    """Return the folder where ``datasets`` caches what it derives from ``dataset``."""
    return Path(dataset.cache_files[0]["filename"]).parent if dataset.cache_files else Path(tempfile.gettempdir())


def cache_error(path: Path, error: OSError) -> OutputError:
    """Return the error of a cache that cannot be written."""
    explained = write_error(path, error)
    explained.hint = CACHE_HINT
    return explained


def _open_examples(path: Path, fingerprint: str) -> Dataset | None:
    """Return the examples in a file, None if it does not exist or is not complete."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    try:
        return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=fingerprint)
    except (OSError, pyarrow.ArrowInvalid):
        return None


class _StoredByAnotherError(Exception):
    """Another process stored the same examples first."""


def _write_examples(path: Path, names: Sequence[str], examples: Iterable[Mapping[str, str]], description: str) -> None:
    import pyarrow

    schema = pyarrow.schema([(column, pyarrow.string()) for column in names])
    # Shown on a terminal only. The number of rows is not known before they are read.
    progress = tqdm(examples, desc=description, unit=" rows", disable=None)
    try:
        with contextlib.suppress(_StoredByAnotherError), open_atomically(path) as file:
            with pyarrow.ipc.new_stream(file, schema) as writer:
                for batch in _iter_batches(progress, schema):
                    writer.write_batch(batch)
            # Others may have mapped its file, and on a network file system a replaced file disappears under them.
            if _open_examples(path, "") is not None:
                raise _StoredByAnotherError
    except OutputError as error:
        error.hint = CACHE_HINT
        raise


def _iter_batches(examples: Iterable[Mapping[str, str]], schema: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    """Yield batches that are small in rows and in characters, so that memory stays small for any file."""
    rows: list[Mapping[str, str]] = []
    characters = 0
    for example in examples:
        rows.append(example)
        characters += sum(map(len, example.values()))
        if len(rows) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield _build_batch(rows, schema)
            rows, characters = [], 0
    if rows:
        yield _build_batch(rows, schema)


def _build_batch(rows: list[Mapping[str, str]], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    import pyarrow

    try:
        return pyarrow.RecordBatch.from_pylist(rows, schema)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"one of the examples {rows[0]['id']} to {rows[-1]['id']} is too long: {error}", "shorten or split it"
        ) from error
