"""Everything that a report writes: the page, RESULTS.md, and the data for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftbench.common.filesystem import write_atomically
from peftbench.record import RunRecord
from peftbench.report.analysis.significance import compare_groups
from peftbench.report.page.build import render_page
from peftbench.report.page.content import UnfinishedRun, build_page_data
from peftbench.report.runs import sort_records, with_unique_names
from peftbench.report.summary import summarize
from peftbench.report.tables.export import json_table, latex_table
from peftbench.report.tables.table import collect_notes, csv_table, markdown_report

PAGE_FILE = "report.html"
RESULTS_FILE = "RESULTS.md"


@dataclass(frozen=True)
class WrittenReport:
    """What was written."""

    page_path: Path
    summary: list[str]
    """The comparison in words."""
    records: list[RunRecord]
    """What was reported on, no two of one name."""
    notes: list[str]
    """What a reader must know beside the figures."""


def write_report(
    records: Mapping[Path, RunRecord],
    output_dir: Path,
    title: str,
    *,
    page_path: Path | None = None,
    unfinished_runs: Sequence[UnfinishedRun] = (),
) -> WrittenReport:
    """Write the page, RESULTS.md and the data as CSV, JSON and LaTeX to ``folder``.

    ``records`` are by the paths of their files, which is how the page says to repeat them. The page goes to ``html``
    where that is given.

    Raises:
        OutputError: a file cannot be written.
    """
    records = with_unique_names(records)
    rows = list(records.values())
    compared = compare_groups(rows)
    said, told = summarize(rows, compared), collect_notes(sort_records(rows))
    data = build_downloads(rows, said, told)
    results = markdown_report(rows, title, said, told)
    shown = render_page(
        build_page_data(
            records, title, said, comparison_set=compared, note_lines=told, unfinished_runs=unfinished_runs
        ),
        data,
    )
    # All is made before anything is written, so that what lies there is of one report.
    for one in data.values():
        write_atomically(output_dir / one["name"], one["text"])
    write_atomically(output_dir / RESULTS_FILE, results)
    path = page_path or output_dir / PAGE_FILE
    write_atomically(path, shown)
    return WrittenReport(path, said, rows, told)


def build_downloads(
    records: Sequence[RunRecord], summary: Sequence[str], note_lines: Sequence[str] | None = None
) -> dict[str, dict[str, str]]:
    """The data as files, by kind: each with its name, media type and text; ``told`` are the notes, if made already."""
    made = {
        "csv": ("text/csv", csv_table(records)),
        "json": ("application/json", json_table(records, summary, note_lines)),
        "tex": ("text/x-tex", latex_table(records)),
    }
    return {kind: {"name": f"results.{kind}", "type": type_, "text": text} for kind, (type_, text) in made.items()}
