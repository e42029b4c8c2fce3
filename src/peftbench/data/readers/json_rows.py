"""Rows of a JSON lines file, and of a ``.json`` file with one array of objects."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from peftbench.data.readers.json_faults import JSON_SPACES, describe_json_fault
from peftbench.data.readers.rows import (
    Cell,
    CellFault,
    Columns,
    Row,
    SplitLocation,
    find_surrogate,
    to_json,
    to_printable,
)
from peftbench.data.readers.text_file import open_text
from peftbench.errors import DataError

_HEAD_ROWS = 1000
"""Rows that are searched for the names of columns."""
_TEXT_ADVICE = "write text in double quotes"
_LONGEST_INTEGER = 4000
"""Digits of an integer; Python converts no more than 4,300."""


class _Integer(str):
    """An integer as it is written."""

    __slots__ = ()


class _Decimal(str):
    """A number with a fraction or an exponent, as it is written."""

    __slots__ = ()


class _Object(list[tuple[str, object]]):
    """Names and values of an object, in order and with repeated names."""


class _InvalidConstantError(ValueError):
    """NaN or an infinity, which JSON does not have."""


def _refuse_constant(name: str) -> NoReturn:
    raise _InvalidConstantError(name)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_Object, parse_int=_Integer, parse_float=_Decimal, parse_constant=_refuse_constant
)


def iter_json_rows(location: SplitLocation, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line; a ``.json`` file may have one array of objects.

    Raises:
        DataError: the file cannot be read; the message has the line and the fault.
        MissingColumnError: no object has a used column.
    """
    with open_text(location, "json", newline="\n") as file:
        objects = _iter_objects(file, location)
        head = list(itertools.islice(objects, _HEAD_ROWS))
        names = _list_names(head)
        for name in columns.names.values():
            if head and name not in names:
                raise location.missing_column(name, names)
        for line, pairs in itertools.chain(head, objects):
            cells: Sequence[Cell] = ()
            try:
                cells = () if pairs is None else _read_cells(pairs, columns, line, location)
            except DataError as error:
                location.report(error)
            yield line, cells


def read_json_names(location: SplitLocation) -> list[str]:
    """Return the names in the first objects of a file.

    Raises:
        DataError: the file cannot be read; the message has the line and the fault.
    """
    with open_text(location, "json", newline="\n") as file:
        return _list_names(itertools.islice(_iter_objects(file, location), _HEAD_ROWS))


def _list_names(objects: Iterable[tuple[int, _Object | None]]) -> list[str]:
    return list(dict.fromkeys(name for _, pairs in objects for name, _ in pairs or ()))


def _iter_objects(file: TextIO, location: SplitLocation) -> Iterator[tuple[int, _Object | None]]:
    """Yield the line and the content of each object, None for one whose fault was reported."""
    is_first = True
    for number, line in enumerate(file, 1):
        if not line.strip(JSON_SPACES):
            continue
        if is_first and line.lstrip(JSON_SPACES).startswith("["):
            if ".json" not in Path(location.path).suffixes[-2:]:
                raise location.unreadable(
                    "json",
                    f"line {number} starts an array, and a JSON lines file has one object on each line",
                    "rename the file to end in .json, or convert it, for example with: jq -c '.[]'",
                )
            yield from _iter_array(line + file.read(), number, location)
            return
        is_first = False
        try:
            content = _parse_line(line, number, location)
        except DataError as error:
            location.report(error)
            content = None
        yield number, content


def _iter_array(text: str, first_line: int, location: SplitLocation) -> Iterator[tuple[int, _Object]]:
    """Yield the line and the content of each object of an array, which starts with the text."""
    position = _skip_spaces(text, text.index("[") + 1)
    line, counted = first_line, 0
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        content, position = _parse(text, position, line, location)
        yield line, content
        position = _skip_spaces(text, position)
        if text.startswith(",", position):
            position = _skip_spaces(text, position + 1)
            if not text.startswith("]", position):
                continue
        elif text.startswith("]", position):
            continue
        fault = json.JSONDecodeError("Expecting ',' delimiter", text, position)
        raise _array_fault(text, fault, first_line, location)
    if rest := text[position + 1 :].strip(JSON_SPACES):
        raise _array_fault(text, json.JSONDecodeError("Extra data", text, text.rindex(rest)), first_line, location)


def _array_fault(text: str, fault: json.JSONDecodeError, first_line: int, location: SplitLocation) -> DataError:
    clause, advice = describe_json_fault(text, fault)
    return location.unreadable("json", f"line {_find_line(text, 0, fault, first_line)} {clause}", advice)


def _find_line(text: str, start: int, fault: json.JSONDecodeError, line: int) -> int:
    """Return the line of a fault in a text in which ``start`` is in ``line``; the end of a text is in its last line."""
    return line + text.count("\n", start, min(fault.pos, len(text.rstrip(JSON_SPACES))))


def _parse_line(text: str, line: int, location: SplitLocation) -> _Object:
    """Parse a line that has one object."""
    value, end = _parse(text, len(text) - len(text.lstrip(JSON_SPACES)), line, location)
    if text[end:].strip(JSON_SPACES):
        clause, advice = describe_json_fault(text, json.JSONDecodeError("Extra data", text, _skip_spaces(text, end)))
        raise location.unreadable("json", f"line {line} {clause}", advice)
    return value


def _parse(text: str, start: int, line: int, location: SplitLocation) -> tuple[_Object, int]:
    """Parse the object that starts at ``start`` in ``line``; return it and the position after it."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        clause, advice = describe_json_fault(text, error)
        raise location.unreadable("json", f"line {_find_line(text, start, error, line)} {clause}", advice) from error
    except _InvalidConstantError as error:
        fault = f"line {line} has {error}, which JSON does not allow"
        raise location.unreadable("json", fault, "write null or text") from error
    except RecursionError as error:
        raise location.unreadable("json", f"line {line} is nested too deeply", "correct that line") from error
    if not isinstance(value, _Object):
        raise location.unreadable("json", f"line {line} is {_name_value(value)}, not an object", "correct that line")
    return value, end


def _skip_spaces(text: str, position: int) -> int:
    while position < len(text) and text[position] in JSON_SPACES:
        position += 1
    return position


def _read_cells(pairs: _Object, columns: Columns, line: int, location: SplitLocation) -> list[Cell]:
    values = dict(pairs)
    if len(values) < len(pairs):
        written = [name for name, _ in pairs]
        for name in columns.names.values():
            if written.count(name) > 1:
                raise location.unreadable("json", f"line {line} has the name {name!r} twice", "correct that line")
    return [
        _read_structure(values.get(name)) if column in columns.structured else _read_cell(values.get(name), column)
        for column, name in columns.names.items()
    ]


def _read_cell(value: object, column: str) -> Cell:
    is_id = column == "id"
    if value is None or (is_id and isinstance(value, _Integer)):
        return value
    if type(value) is not str:
        return CellFault(_name_value(value), _TEXT_ADVICE + (", or an integer" if is_id else ""))
    return find_surrogate(value) or value


def parse_structure(text: str) -> Cell:
    """Return the cell of a structured column whose value is written as JSON.

    Raises:
        ValueError, RecursionError: the text is not JSON.
    """
    return _read_structure(_DECODER.decode(text))


def _read_structure(value: object) -> Cell:
    try:
        return to_json(_to_plain(value))
    except _RepeatedNameError as error:
        return CellFault(f"the name {error.args[0]!r} twice in one object", "correct that line")


class _RepeatedNameError(ValueError):
    """An object with two values of one name."""


def _to_plain(value: object) -> object:
    """Return a parsed value in Python's own types."""
    if isinstance(value, _Object):
        plain = {name: _to_plain(content) for name, content in value}
        if len(plain) < len(value):
            names = [name for name, _ in value]
            raise _RepeatedNameError(next(name for name in names if names.count(name) > 1))
        return plain
    if isinstance(value, list):
        return [_to_plain(content) for content in value]
    if isinstance(value, _Integer):
        return int(value) if len(value) < _LONGEST_INTEGER else str(value)
    return float(value) if isinstance(value, _Decimal) else value


def _name_value(value: object) -> str:
    """Return what a value is, as written in the file: ``the number 1.10``, ``a list``."""
    if isinstance(value, (_Integer, _Decimal)):
        return f"the number {to_printable(value)}"
    if value is None or isinstance(value, bool):
        return f"the value {json.dumps(value)}"
    kinds = ((_Object, "an object"), (list, "a list"), (str, "a string"))
    return next(name for kind, name in kinds if isinstance(value, kind))
