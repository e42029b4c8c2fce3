"""Rows of a CSV file: every cell is text as it is written."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from peftbench.data.readers.json_rows import parse_structure
from peftbench.data.readers.rows import Cell, Columns, Row, SplitLocation, to_json
from peftbench.data.readers.text_file import open_text
from peftbench.errors import DataError

_LONGEST_CELL = 2**31 - 1  # the largest limit that the csv module takes on every system
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class _Lines:
    """The lines of a file; keeps those of the current record, to find the quote that was not closed."""

    def __init__(self, file: TextIO, location: SplitLocation) -> None:
        self.file, self.location = file, location
        self.number = 0
        self.record: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.number += 1
            if "\0" in line:
                raise self.location.unreadable("csv", f"line {self.number} has a NUL byte", "correct that line")
            self.record.append(line)
            yield line

    @property
    def first_line(self) -> int:
        """Number of the current record's first line."""
        return self.number - len(self.record) + 1


def iter_csv_rows(location: SplitLocation, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header, commas and double quotes (RFC 4180); an empty cell is missing.

    The cell of a structured column is a JSON list or object, or text.

    Raises:
        DataError: the file cannot be read; the message has the line and the fault.
        MissingColumnError: the header lacks a used column.
    """
    with open_text(location, "csv", newline="") as file, _allow_long_cells():
        records = _iter_records(file, location)
        header = _read_header(records, location)
        if not header:
            return
        places = [
            (_find_column(name, header, location), column in columns.structured)
            for column, name in columns.names.items()
        ]
        for line, cells in records:
            if len(cells) != len(header):
                location.report(_count_fault(line, len(cells), len(header), location))
                yield line, ()
                continue
            yield (
                line,
                [_read_structure(cells[place]) if is_json else cells[place] or None for place, is_json in places],
            )


def read_csv_names(location: SplitLocation) -> list[str]:
    """Return the names in the header of a CSV file, none if the file is empty.

    Raises:
        DataError: the file cannot be read.
    """
    with open_text(location, "csv", newline="") as file, _allow_long_cells():
        return _read_header(_iter_records(file, location), location)


def _read_header(records: Iterator[tuple[int, list[str]]], location: SplitLocation) -> list[str]:
    line, header = next(records, (1, []))
    if header and not any(name.strip() for name in header):
        raise location.unreadable("csv", f"line {line} has no column names", "write them in the first line")
    return header


def _read_structure(cell: str) -> Cell:
    if cell.lstrip().startswith(("[", "{")):
        try:
            return parse_structure(cell)
        except (ValueError, RecursionError):
            pass
    return to_json(cell or None)


@contextmanager
def _allow_long_cells() -> Iterator[None]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _iter_records(file: TextIO, location: SplitLocation) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each record that is not a blank line."""
    lines = _Lines(file, location)
    # The default limit is 131072 characters. Strict: text after a closing quote is an error.
    reader = csv.reader(lines, strict=True)
    while True:
        lines.record.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise location.unreadable("csv", *_describe_fault(lines, str(error))) from error
        if cells is None:
            return
        if cells:
            yield lines.first_line, cells


def _count_fault(line: int, values: int, columns: int, location: SplitLocation) -> DataError:
    fault = f"line {line} has {values} value{'s' * (values != 1)}, and the header has {columns} columns"
    advice = "put double quotes around a value that contains commas" if values > columns else "correct that line"
    return location.unreadable("csv", fault, advice)


def _describe_fault(lines: _Lines, message: str) -> tuple[str, str]:
    """Return what is wrong with the current record, and what to do."""
    opening = lines.first_line + _find_open_quote("".join(lines.record))
    if message == "unexpected end of data":
        return f"the quote that opens in line {opening} is never closed", "correct that line"
    if "expected after" not in message:
        return f"line {lines.number} is not valid CSV ({message})", "correct that line"
    advice = "double each quote inside a quoted value"
    if opening == lines.number:
        return f"line {opening} has text after the quote that closes a value", advice
    return f"the quote that opens in line {opening} is closed in line {lines.number}, before its value ends", advice


def _find_open_quote(record: str) -> int:
    """Return how many lines precede the last quote of ``record`` that opens a value."""
    opening, is_quoted, is_start, position = 0, False, True, 0
    while position < len(record):
        character = record[position]
        if is_quoted:
            if character == '"':
                if record.startswith('""', position):
                    position += 1
                else:
                    is_quoted = False
        elif character == '"' and is_start:
            opening, is_quoted = position, True
        is_start = not is_quoted and character == ","
        position += 1
    return len(_LINE_BREAK.findall(record, 0, opening))


def _find_column(name: str, header: Sequence[str], location: SplitLocation) -> int:
    if name not in header:
        delimiter = next((mark for mark in _OTHER_DELIMITERS if len(header) == 1 and mark in header[0]), None)
        raise location.missing_column(name, header, _OTHER_DELIMITERS[delimiter] if delimiter else None)
    if header.count(name) > 1:
        raise location.repeated_column(name)
    return header.index(name)
