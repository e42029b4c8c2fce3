"""Everything that a report writes: the page, RESULTS.md, and the data for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftbench.files import write_atomically
from peftbench.record import RunRecord
from peftbench.report.differences import differences
from peftbench.report.export import json_table, latex_table
from peftbench.report.page.build import write_page
from peftbench.report.page.content import Unfinished, content
from peftbench.report.table import csv_table, markdown_report
from peftbench.report.words import summary

PAGE = "report.html"
RESULTS = "RESULTS.md"


@dataclass(frozen=True)
class Written:
    """What was written."""

    page: Path
    summary: list[str]
    """The comparison in words."""


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
    rows = list(records.values())
    compared = differences(rows)
    said = summary(rows, compared)
    data = downloads(rows, said)
    for one in data.values():
        write_atomically(folder / one["name"], one["text"])
    write_atomically(folder / RESULTS, markdown_report(rows, title, said))
    path = html or folder / PAGE
    write_page(path, content(records, title, said, compared=compared, unfinished=unfinished), data)
    return Written(path, said)


def downloads(records: Sequence[RunRecord], summary: Sequence[str]) -> dict[str, dict[str, str]]:
    """The data as files, by kind: each with its name, media type and text."""
    made = {
        "csv": ("text/csv", csv_table(records)),
        "json": ("application/json", json_table(records, summary)),
        "tex": ("text/x-tex", latex_table(records)),
    }
    return {kind: {"name": f"results.{kind}", "type": type_, "text": text} for kind, (type_, text) in made.items()}
