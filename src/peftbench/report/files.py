"""Everything that a report writes: the page, RESULTS.md, and the data for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peftbench.files import write_atomically
from peftbench.record import RunRecord
from peftbench.report.export import json_table, latex_table
from peftbench.report.page.build import write_page
from peftbench.report.page.content import Unfinished, content
from peftbench.report.table import csv_table, markdown_report

PAGE = "report.html"
RESULTS = "RESULTS.md"


def downloads(records: Sequence[RunRecord], summary: Sequence[str]) -> dict[str, dict[str, str]]:
    """The data as files, by kind: each with its name, media type and text."""
    made = {
        "csv": ("text/csv", csv_table(records)),
        "json": ("application/json", json_table(records, summary)),
        "tex": ("text/x-tex", latex_table(records)),
    }
    return {kind: {"name": f"results.{kind}", "type": type_, "text": text} for kind, (type_, text) in made.items()}
