"""Rows of Arrow tables: Parquet files, and data sets that the library ``datasets`` loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.common.text import first_line
from peftbench.data.readers.rows import Cell, CellFault, Columns, Row, SplitLocation, to_json, to_printable
from peftbench.data.readers.text_file import refuse_other_formats

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_BATCH_ROWS = 1000


def iter_parquet_rows(location: SplitLocation, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: the file cannot be read, or a used column is not text.
        MissingColumnError: the file lacks a used column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with Path(location.path).open("rb") as source:
            start = source.read(64)
            if not start:
                return
            if not start.startswith(b"PAR1"):
                refuse_other_formats(start, location, "parquet")
            with parquet.ParquetFile(source, page_checksum_verification=True) as file:
                names = list(dict.fromkeys(columns.names.values()))
                check_schema(file.schema_arrow, columns, location)
                yield from iter_batch_rows(file.iter_batches(_BATCH_ROWS, columns=names), columns)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise location.unreadable("parquet", _shorten(error), "write the file again") from error
    except OSError as error:  # pyarrow's own errors of a damaged file have no errno
        if error.errno is not None:
            raise location.read_error(error) from error
        raise location.unreadable("parquet", _shorten(error), "write the file again") from error


def iter_dataset_rows(dataset: Dataset, location: SplitLocation, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a data set.

    Raises:
        DataError: a used column is not text.
        MissingColumnError: the data set lacks a used column.
    """
    check_schema(dataset.features.arrow_schema, columns, location)
    names = list(dict.fromkeys(columns.names.values()))
    tables: Iterable[pyarrow.Table] = dataset.select_columns(names).with_format("arrow").iter(_BATCH_ROWS)
    yield from iter_batch_rows((batch for table in tables for batch in table.to_batches()), columns)


def check_schema(schema: pyarrow.Schema, columns: Columns, location: SplitLocation) -> None:
    """Check that each used column exists once and is text; an id may be an integer.

    Raises:
        DataError: it is not.
    """
    from pyarrow import types

    for column, name in columns.names.items():
        count = schema.names.count(name)
        if count == 0:
            raise location.missing_column(name, schema.names)
        if count > 1:
            raise location.repeated_column(name)
        if column in columns.structured:
            continue
        kind = schema.field(name).type
        is_integer_id = column == "id" and types.is_integer(kind)
        if not (is_integer_id or types.is_null(kind) or _is_text(kind)):
            raise location.column_type(name, str(kind))


def iter_batch_rows(batches: Iterable[pyarrow.RecordBatch], columns: Columns) -> Iterator[Row]:
    """Yield the rows of batches whose schema was checked."""
    for batch in batches:
        cells = [
            _read_structures(batch.column(name)) if column in columns.structured else _read_cells(batch.column(name))
            for column, name in columns.names.items()
        ]
        for row in zip(*cells, strict=True):
            yield None, row


def read_parquet_names(location: SplitLocation) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        return list(parquet.read_schema(location.path).names)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise location.unreadable("parquet", _shorten(error), "write the file again") from error
    except OSError as error:
        raise location.read_error(error) from error


def _read_structures(array: pyarrow.Array) -> Sequence[Cell]:
    """Return the cells of a column of any type as JSON."""
    cells: list[Cell] = []
    for value in array.to_pylist():
        try:
            cells.append(to_json(value))
        except (TypeError, ValueError):
            cells.append(CellFault(f"a value of type {array.type}, which JSON does not have,", "convert it to text"))
    return cells


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    checks = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
    )
    return any(check(kind) for check in checks)


def _read_cells(array: pyarrow.Array) -> Sequence[Cell]:
    """Return the cells of a column; bytes are decoded as UTF-8, which Parquet does not check for text either."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_null(array.type):
        return [None] * len(array)
    if types.is_integer(array.type):
        return [None if value is None else str(value) for value in array.to_pylist()]
    if types.is_string_view(array.type):
        array = array.cast(pyarrow.large_string())
    return [None if value is None else _decode(value) for value in array.cast(pyarrow.large_binary()).to_pylist()]


def _decode(value: bytes) -> Cell:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        return CellFault(
            f"bytes that are not UTF-8 (0x{value[error.start]:02x} at position {error.start})",
            "write the text as UTF-8, or name another column",
        )


def _shorten(error: Exception) -> str:
    return f"it is not a valid Parquet file ({to_printable(first_line(error).rstrip('.'), 200)})"
