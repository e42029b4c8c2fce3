"""Everything that a report writes: the page, RESULTS.md, and the data for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftbench.files import write_atomically
from peftbench.record import RunRecord
from peftbench.report.differences import differences
from peftbench.report.export import json_table, latex_table
from peftbench.report.naming import uniquely_named
from peftbench.report.page.build import page
from peftbench.report.page.content import Unfinished, content
from peftbench.report.table import csv_table, markdown_report, notes, ordered
from peftbench.report.words import summary

PAGE = "report.html"
RESULTS = "RESULTS.md"


@dataclass(frozen=True)
class Written:
    """What was written."""

    page: Path
    summary: list[str]
    """The comparison in words."""
    records: list[RunRecord]
    """What was reported on, no two of one name."""
    notes: list[str]
    """What a reader must know beside the figures."""


def write_report(
    records: Mapping[Path, RunRecord],
    folder: Path,
    title: str,
    *,
    html: Path | None = None,
    unfinished: Sequence[Unfinished] = (),
) -> Written:
    """Write the page, RESULTS.md and the data as CSV, JSON and LaTeX to ``folder``.

    ``records`` are by the paths of their files, which is how the page says to repeat them. The page goes to ``html``
    where that is given.

    Raises:
        OutputError: a file cannot be written.
    """
    records = uniquely_named(records)
    rows = list(records.values())
    compared = differences(rows)
    said, told = summary(rows, compared), notes(ordered(rows))
    data = downloads(rows, said, told)
    results = markdown_report(rows, title, said, told)
    shown = page(content(records, title, said, compared=compared, told=told, unfinished=unfinished), data)
    # All is made before anything is written, so that what lies there is of one report.
    for one in data.values():
        write_atomically(folder / one["name"], one["text"])
    write_atomically(folder / RESULTS, results)
    path = html or folder / PAGE
    write_atomically(path, shown)
    return Written(path, said, rows, told)


def downloads(
    records: Sequence[RunRecord], summary: Sequence[str], told: Sequence[str] | None = None
) -> dict[str, dict[str, str]]:
    """The data as files, by kind: each with its name, media type and text; ``told`` are the notes, if made already."""
    made = {
        "csv": ("text/csv", csv_table(records)),
        "json": ("application/json", json_table(records, summary, told)),
        "tex": ("text/x-tex", latex_table(records)),
    }
    return {kind: {"name": f"results.{kind}", "type": type_, "text": text} for kind, (type_, text) in made.items()}
