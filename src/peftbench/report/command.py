"""What ``peftbench report`` does, with one folder or with two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from peftbench.errors import OutOfRangeError
from peftbench.files import write_atomically
from peftbench.record import RunRecord, find_records, read_records_by_path
from peftbench.report.beside import beside
from peftbench.report.beside_text import plain, print_beside, regressed
from peftbench.report.figures import parse_thresholds
from peftbench.report.files import Written
from peftbench.report.page.build import beside_page
from peftbench.report.table import print_table


def compare_folders(
    sides: tuple[Path, Path], thresholds: Sequence[str], as_json: bool, html: Path | None, others: Mapping[str, object]
) -> str | None:
    """Print two folders side by side; returns a sentence that says what fell, or None where nothing did.

    A page of it goes to ``html``, if that is given. ``others`` are what else the command has, by name, and None where
    it was not given.

    Raises:
        OutOfRangeError: something was given that is of one folder's report.
        PeftbenchError: a threshold that cannot be meant, or a folder whose records cannot be compared.
    """
    if mixed := [name for name, value in others.items() if value is not None]:
        raise OutOfRangeError(f"--compare A B says which two folders are compared; leave {_listed(mixed)} out")
    found = beside(*sides, parse_thresholds(thresholds))
    if html is not None:
        write_atomically(html, beside_page(found))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        print_beside(found)
    return regressed(found) if found.fell else None


def one_folder(folder: Path | None, others: Mapping[str, object]) -> Path:
    """The folder whose report is made, where none are compared.

    Raises:
        OutOfRangeError: there is none, or something was given that is of a comparison (``others``, as above).
    """
    if mixed := [name for name, value in others.items() if value is not None]:
        raise OutOfRangeError(f"{_listed(mixed)} cannot be meant for one folder; give two by --compare A B")
    if folder is None:
        raise OutOfRangeError("there is no folder to report on; give the one that a suite wrote to, or --compare A B")
    return folder


def records_of(folder: Path, price_per_hour: float | None, *, may_be_none: bool) -> dict[Path, RunRecord]:
    """The records below a folder by their files, at another price of an hour where one is given.

    Raises:
        RecordError: one cannot be read, or there are none, unless there ``may_be_none``.
    """
    records = find_records(folder) if may_be_none else read_records_by_path(folder)
    if price_per_hour is None:
        return records
    return {path: record.priced(price_per_hour) for path, record in records.items()}


def show_report(written: Written, records: Mapping[Path, RunRecord], title: str) -> None:
    """Print the comparison, the words, and where the page is; the last line is ``report:`` and the page's path."""
    if records:
        print_table(list(records.values()), title)
    for sentence in written.summary:
        typer.echo(f"- {plain(sentence)}")
    typer.echo(f"report: {written.page}")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
