"""Rows of a file, the checks of their cells, and the errors that name the file, the line and the column."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peftbench.errors import DataError, EmptySplitError, MissingColumnError, did_you_mean

_SHOWN_NAMES = 20


@dataclass(frozen=True)
class CellFault:
    """A cell whose content is not text."""

    content: str
    """Description for the error, e.g. ``the number 1.10``."""
    advice: str
    """Correction for the error."""


def to_printable(text: str, max_length: int = 60) -> str:
    """Return text for a message: on one line, and not too long."""
    escaped = repr(text)[1:-1]
    return escaped if len(escaped) <= max_length else escaped[:max_length] + "..."


Cell = str | CellFault | None
"""Text as it is written; None: missing."""
Row = tuple[int | None, Sequence[Cell]]
"""Line of the file (None where a file has no lines), and the cells of the used columns in their order.

No cells: the row has a fault that was reported.
"""


@dataclass(frozen=True)
class RowFault:
    """A row that the task cannot use, though its cells have the right type."""

    content: str
    """Clause for the error, e.g. ``has two assistant messages in a row``."""
    advice: str
    """Correction for the error."""


Example = Mapping[str, str]
"""A row under the task's names of columns; the cells of structured columns are JSON."""


def _accept(example: Example) -> None:
    """Accept every example."""


@dataclass(frozen=True)
class Columns:
    """The columns that a task reads, and what their cells hold."""

    named: Mapping[str, str]
    """Name of the file's column by the task's name for it."""
    id: str | None = None
    """Column with the example's id; None: the row number is the id."""
    structured: frozenset[str] = frozenset()
    """Columns (the task's names) with any JSON value; an example holds it as JSON. The others have text."""
    optional: frozenset[str] = frozenset()
    """Columns (the task's names) whose cells may be empty."""
    check: Callable[[Example], RowFault | None] = _accept
    """Returns what is wrong with an example, None if nothing is."""
    version: int = 1
    """Version of ``check``: part of the cache's key."""

    @property
    def names(self) -> dict[str, str]:
        """Name of the file's column by the example's column, without an id that is the row's number."""
        return ({} if self.id is None else {"id": self.id}) | dict(self.named)

    @property
    def cache_key(self) -> list[object]:
        """Everything that examples depend on in addition to the content of the files."""
        return [self.names, sorted(self.structured), sorted(self.optional), self.version]


def to_json(value: object) -> Cell:
    """Return the cell of a structured column with this value (of JSON's types)."""
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False)
    return text if (fault := find_surrogate(text)) is None else fault


def find_surrogate(text: str) -> CellFault | None:
    """Return the fault of a text with half of a character, None if it has none."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        return CellFault(f"{half}, which is half of a character,", "write both halves, or the character itself")
    return None


@dataclass(frozen=True)
class SplitLocation:
    """File of a split, or its data set on the Hub. Builds the errors that name it."""

    split: str
    path: str
    """Path of the file or name of the data set."""
    faults: list[DataError] | None = None
    """Collects the faults of rows, which are then skipped; None: the first fault ends the reading."""

    def report(self, fault: DataError) -> None:
        """Keep the fault of a row.

        Raises:
            DataError: the fault, if faults are not collected.
        """
        if self.faults is None:
            raise fault
        self.faults.append(fault)

    def unreadable(self, kind: str, fault: str, advice: str = "correct the file") -> DataError:
        """Return the error of a file that is not valid ``kind``."""
        return DataError(f"{self.path} cannot be read as {kind}: {fault}", advice)

    def read_error(self, error: OSError) -> DataError:
        """Return the error of a file that the system cannot read."""
        return DataError(f"{self.path} cannot be read: {error.strerror or error}", "check the path and its permissions")

    def missing_column(self, name: str, names: Sequence[str], separator: str | None = None) -> MissingColumnError:
        """Return the error of a column that does not exist; ``separator`` is what the file has in place of commas."""
        fault = f"the {self.split} split of {self.path} has no column {name!r}"
        if separator is not None:
            return MissingColumnError(f"{fault}: its values are separated by {separator}", "separate them by commas")
        shown = [to_printable(known) for known in names[:_SHOWN_NAMES]]
        more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
        number = "; to number the rows instead, set data.source.id=null" if name == "id" else ""
        return MissingColumnError(f"{fault}; {did_you_mean(name, shown)}{more}{number}")

    def repeated_column(self, name: str) -> DataError:
        """Return the error of a used column whose name occurs more than once."""
        return DataError(
            f"the {self.split} split of {self.path} has several columns {name!r}", "give each of them its own name"
        )

    def column_type(self, name: str, kind: str) -> DataError:
        """Return the error of a column whose type is not text."""
        place = f"column {name!r} of the {self.split} split of {self.path}"
        fault = f"{place} has type {to_printable(kind)}, which is not text"
        return DataError(fault, "convert it to text, or name another column")

    def no_examples(self) -> EmptySplitError:
        """Return the error of a file without rows."""
        return EmptySplitError(
            f"the {self.split} split of {self.path} has no examples; give a file that has at least one"
        )

    def cell_fault(self, place: str, name: str, fault: CellFault) -> DataError:
        """Return the error of a cell that is not text."""
        return DataError(
            f"{place} of the {self.split} split of {self.path} has {fault.content} in column {name!r}", fault.advice
        )

    def empty_cell(self, place: str, name: str) -> DataError:
        """Return the error of a cell without text."""
        return DataError(f"{place} of the {self.split} split of {self.path} has no {name}; add it or remove the row")

    def row_fault(self, place: str, fault: RowFault) -> DataError:
        """Return the error of a row that the task cannot use."""
        return DataError(f"{place} of the {self.split} split of {self.path} {fault.content}", fault.advice)


def iter_examples(
    rows: Iterable[Row], columns: Columns, location: SplitLocation, first_index: int = 0
) -> Iterator[Example]:
    """Yield the rows as examples; a row without an id gets its number, counted from ``first_index``.

    Raises:
        DataError: a cell is empty or has the wrong type, or the task cannot use the row.
    """
    for index, (line, cells) in enumerate(rows, first_index):
        if not cells:
            continue
        place = f"example {index}" + (f" (line {line})" if line is not None else "")
        try:
            example = {"id": str(index)} | _read_cells(cells, columns, location, place)
            if (fault := columns.check(example)) is not None:
                raise location.row_fault(place, fault)
        except DataError as error:
            location.report(error)
            continue
        yield example


def _read_cells(cells: Sequence[Cell], columns: Columns, location: SplitLocation, place: str) -> dict[str, str]:
    example: dict[str, str] = {}
    for (column, name), cell in zip(columns.names.items(), cells, strict=True):
        if isinstance(cell, CellFault):
            raise location.cell_fault(place, name, cell)
        if column in columns.optional or column == "id":
            example[column] = cell or ""
        elif cell and not cell.isspace():
            example[column] = cell
        if column not in example or (column == "id" and cell is None):
            raise location.empty_cell(place, name)
    return example
