"""The comparison as JSON and as a LaTeX table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from peftbench.record import RunRecord
from peftbench.report.runs import sort_records
from peftbench.report.tables.columns import build_columns
from peftbench.report.tables.table import collect_notes, render_table
from peftbench.report.text.escape import escaped_line
from peftbench.report.text.formatting import finite_or_none


def json_table(records: Sequence[RunRecord], summary: Sequence[str], note_lines: Sequence[str] | None = None) -> str:
    """Return all values of all runs at full precision, with column descriptions, summary and notes.

    ``note_lines`` avoids collecting the notes again.
    """
    rows, columns = sort_records(records), build_columns(records)
    return (
        json.dumps(
            {
                "summary": list(summary),
                "notes": list(collect_notes(rows) if note_lines is None else note_lines),
                "columns": {column.title: column.description for column in columns},
                "runs": [
                    {
                        key: finite_or_none(value)
                        for column in columns
                        for key, value in column.raw_values(record).items()
                    }
                    | {
                        "started_at": record.started_at,
                        "device": record.device.name,
                        "commit": record.git_commit,
                        "recipe_fingerprint": record.recipe_fingerprint,
                        "recipe": record.recipe,
                    }
                    for record in rows
                ],
            },
            indent=1,
        )
        + "\n"
    )


def latex_table(records: Sequence[RunRecord]) -> str:
    r"""Return the comparison as a ``tabular`` of the package booktabs, for ``\input``."""
    table = render_table(records, "latex_booktabs", escaped_line)  # tabulate escapes LaTeX's special characters
    # LaTeX would read a cell that starts with [ or * as an option of the \\ before it.
    table = re.sub(r"^(\s*)(?=[\[*])", r"\1{}", table, flags=re.MULTILINE)
    return "% needs \\usepackage{booktabs}; made by peftbench report\n" + table.replace("–", "--") + "\n"
