"""Actions of the commands ``report`` and ``compare``."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from peftbench.cli.options import print_to_stderr
from peftbench.common.filesystem import write_atomically
from peftbench.errors import OutOfRangeError, OutputError
from peftbench.record import RunRecord, scan_records
from peftbench.report.diff.compute import diff_suites
from peftbench.report.diff.metrics import parse_thresholds
from peftbench.report.diff.render import print_diff, regression_summary
from peftbench.report.runs import with_unique_names
from peftbench.report.tables.pivot import rows_by_setting
from peftbench.report.tables.table import insert_table, print_table, terminal_table
from peftbench.report.text.escape import terminal_safe
from peftbench.report.text.formatting import join_with_and

if TYPE_CHECKING:
    from peftbench.report.writer import WrittenReport


def compare_folders(
    folders: tuple[Path, Path],
    thresholds: Sequence[str],
    as_json: bool,
    page_path: Path | None,
) -> str | None:
    """Print the comparison of two folders, and write it as a page to ``page_path`` unless that is None.

    Returns:
        A sentence that names the regressed metrics, None if there is no regression.

    Raises:
        PeftbenchError: an invalid threshold, or a folder whose records cannot be compared.
    """
    diff = diff_suites(*folders, parse_thresholds(thresholds))
    if page_path is not None:
        from peftbench.report.page.build import render_diff_page  # the page's libraries take a second

        write_atomically(page_path, render_diff_page(diff))
    if as_json:
        typer.echo(diff.model_dump_json(indent=1))
    else:
        print_diff(diff)
    return regression_summary(diff) if diff.regressed else None


def load_records(folder: Path, price_per_hour: float | None, *, allow_empty: bool) -> dict[Path, RunRecord]:
    """Return the records below a folder, keyed by path, with unique names and, if given, another hourly price.

    A note on standard error names each record that cannot be read.

    Raises:
        RecordError: no record can be read and ``allow_empty`` is False.
    """
    scan = scan_records(folder, allow_empty=allow_empty)
    for sentence in scan.unreadable.values():
        print_to_stderr(f"note: {terminal_safe(sentence)}; the other runs are shown")
    records = with_unique_names(scan.records)
    if price_per_hour is None:
        return records
    return {path: record.with_price_per_hour(price_per_hour) for path, record in records.items()}


def reject_unused_options(
    page_path: Path | None,
    update_file: Path | None,
    marker: str | None,
    group_by: str | None,
    *,
    open_page: bool = False,
) -> None:
    """Refuse options that would have no effect.

    Raises:
        OutOfRangeError: an option has no effect.
    """
    no_page_options = [
        name for name, value in {"--update-file": update_file, "--group-by": group_by}.items() if value is not None
    ]
    page_options = [name for name, used in {"--html": page_path is not None, "--open": open_page}.items() if used]
    if page_options and no_page_options:
        raise OutOfRangeError(
            f"{page_options[0]} has no effect with {join_with_and(no_page_options)}, which writes no page; omit one of "
            "them"
        )
    if marker is not None and update_file is None:
        raise OutOfRangeError("--marker names a section of a file; give the file with --update-file")


def print_section(
    records: Sequence[RunRecord], update_file: Path | None, marker: str | None, group_by: str | None
) -> None:
    """Insert the table into a file, or print the losses grouped by a key.

    Raises:
        RecordError: the file lacks the section.
        UnknownKeyError: the recipes lack the key.
    """
    if update_file is not None:
        insert_table(records, update_file, marker or "table", group_by)
    elif group_by is not None:
        typer.echo(terminal_table(rows_by_setting(records, group_by)))


def print_report(report: WrittenReport, title: str) -> None:
    """Print the table, the summary and, as last line, ``report:`` with the path of the page, a link on a terminal."""
    if report.records:
        print_table(report.records, title, note_lines=report.notes)
    for sentence in report.summary:
        typer.echo(f"- {terminal_safe(sentence)}")
    for run in report.unfinished_runs:
        typer.echo(f"- unfinished: {terminal_safe(run.sentence)}")
    typer.echo(f"report: {format_link(report.page_path, is_terminal=sys.stdout.isatty())}")


def format_link(path: Path, *, is_terminal: bool) -> str:
    """Return a path; on a terminal as a link (escape sequence OSC 8), which terminals without links show as text."""
    if not is_terminal:
        return str(path)
    return f"\x1b]8;;{path.resolve().as_uri()}\x1b\\{terminal_safe(str(path))}\x1b]8;;\x1b\\"


def open_in_browser(path: Path) -> None:
    """Open a page in the default browser.

    Raises:
        OutputError: no browser was found, e.g. on a server.
    """
    if not webbrowser.open(path.resolve().as_uri()):
        raise OutputError(f"no browser was found to open {path}", "copy the file to a machine with a browser")
