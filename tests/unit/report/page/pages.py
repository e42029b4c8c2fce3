"""Pages of shipped and of synthetic records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peftbench.record import RECORD_FILE, RunRecord, read_record
from peftbench.report.page.build import render_page
from peftbench.report.page.content import UnfinishedRun, build_page_data
from peftbench.report.writer import build_downloads
from tests.helpers.paths import REPOSITORY

SHIPPED = {path.name: path for path in sorted((REPOSITORY / "docs" / "results").iterdir()) if path.is_dir()}
"""Folders of the records in docs/results, by name."""


def load_shipped_records(name: str) -> dict[Path, RunRecord]:
    """Return the records of a shipped suite."""
    return {path: read_record(path) for path in sorted(SHIPPED[name].rglob(RECORD_FILE))}


def write_page(
    records: Mapping[Path, RunRecord],
    folder: Path,
    *,
    title: str = "a suite",
    summary: Sequence[str] = ("A sentence.",),
    unfinished: Sequence[UnfinishedRun] = (),
) -> Path:
    """Write the page of ``records`` to ``folder`` and return its path."""
    path = folder / "report.html"
    page_data = build_page_data(records, title, summary, unfinished_runs=unfinished)
    path.write_text(render_page(page_data, build_downloads(list(records.values()), summary)), encoding="utf-8")
    return path
