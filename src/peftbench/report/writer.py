"""Write a report: the HTML page, RESULTS.md, and the data as CSV, JSON and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftbench.common.filesystem import write_atomically
from peftbench.common.text import make_encodable
from peftbench.record import RunRecord
from peftbench.report.analysis.examples import describe_overlap
from peftbench.report.analysis.significance import compare_groups
from peftbench.report.page.build import render_page
from peftbench.report.page.content import UnfinishedRun, build_page_data
from peftbench.report.recommendation import describe_context, recommend
from peftbench.report.runs import sort_records, with_unique_names
from peftbench.report.summary import summarize
from peftbench.report.tables.export import json_table, latex_table
from peftbench.report.tables.table import collect_notes, csv_table, group_notes, markdown_report

PAGE_FILE = "report.html"
RESULTS_FILE = "RESULTS.md"


@dataclass(frozen=True)
class WrittenReport:
    """A written report."""

    page_path: Path
    summary: list[str]
    """Sentences of the summary, the recommendation first."""
    records: list[RunRecord]
    """The reported runs, with unique names."""
    notes: list[str]
    """Notes that a reader of the tables needs."""
    unfinished_runs: Sequence[UnfinishedRun] = ()
    """Runs without a result."""


def write_report(
    records: Mapping[Path, RunRecord],
    output_dir: Path,
    title: str,
    *,
    page_path: Path | None = None,
    unfinished_runs: Sequence[UnfinishedRun] = (),
) -> WrittenReport:
    """Write the page, RESULTS.md and the data as CSV, JSON and LaTeX to ``output_dir``.

    ``records`` are keyed by the paths of their files, which the reproduce commands use. ``page_path`` overrides the
    path of the page.

    Raises:
        OutputError: a file cannot be written.
    """
    records = with_unique_names(records)
    rows = list(records.values())
    comparison_set = compare_groups(rows)
    recommendation = recommend(comparison_set)
    summary, notes = summarize(rows, comparison_set), collect_notes(sort_records(rows))
    warnings = [f"{warning}." for warning in group_notes(rows, describe_overlap)]
    head = [*warnings, " ".join(recommendation), f"{describe_context(rows)}."] if rows else []
    head = [sentence for sentence in head if sentence]
    page_summary, summary = summary, [*head, *summary]
    downloads = build_downloads(rows, summary, notes)
    unfinished = [run.sentence for run in unfinished_runs]
    markdown = make_encodable(markdown_report(rows, title, summary, notes, unfinished))
    page = render_page(
        build_page_data(
            records,
            title,
            page_summary,
            recommendation=recommendation,
            comparison_set=comparison_set,
            note_lines=notes,
            unfinished_runs=unfinished_runs,
        ),
        downloads,
    )
    # Render everything before writing anything, so that the files are of one report.
    for download in downloads.values():
        write_atomically(output_dir / download["name"], download["text"])
    write_atomically(output_dir / RESULTS_FILE, markdown)
    path = page_path or output_dir / PAGE_FILE
    write_atomically(path, make_encodable(page))
    return WrittenReport(path, summary, rows, notes, unfinished_runs)


def build_downloads(
    records: Sequence[RunRecord], summary: Sequence[str], note_lines: Sequence[str] | None = None
) -> dict[str, dict[str, str]]:
    """Return the data files by kind, each with name, media type and text. ``note_lines`` are computed if None."""
    contents = {
        "csv": ("text/csv", csv_table(records)),
        "json": ("application/json", json_table(records, summary, note_lines)),
        "tex": ("text/x-tex", latex_table(records)),
    }
    return {
        kind: {"name": f"results.{kind}", "type": type_, "text": make_encodable(text)}
        for kind, (type_, text) in contents.items()
    }
