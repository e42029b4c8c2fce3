"""Explain why a data file cannot be read: the line and the fault, in place of the library's message."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path


def explain_unreadable_file(path: Path, kind: str) -> str:
    """Return what is wrong with a file of this kind (json, csv or parquet), as a clause."""
    readers = {"json": _iter_json_faults, "csv": _iter_csv_faults}
    if kind not in readers:
        return f"it is not a valid {kind.capitalize()} file"
    try:
        return next(readers[kind](path), "its rows differ in the type of a column")
    except csv.Error as error:
        return f"a value is not valid CSV ({error})"
    except RecursionError:
        return "a row is nested too deeply"
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"


def _iter_json_faults(path: Path) -> Iterator[str]:
    """Yield the faults of a file with one JSON object per line."""
    types: dict[str, tuple[str, int]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield f"line {number} is not valid JSON: {str(error).partition(': line')[0].lower()}"
                continue
            if not isinstance(row, dict):
                yield f"line {number} is not a JSON object"
                continue
            for key, value in row.items():
                kind = "number" if isinstance(value, (int, float)) else type(value).__name__
                first = types.setdefault(key, (kind, number)) if value is not None else (kind, number)
                if first[0] != kind:
                    yield f"column {key!r} is {first[0]} in line {first[1]} and {kind} in line {number}"


def _iter_csv_faults(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                yield f"line {reader.line_num} has {len(row)} values, and the header has {len(header)} columns"
