"""The comparison for other programs and other pages: JSON, and a table for LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from peftbench.record import RunRecord
from peftbench.report.runs import sort_records
from peftbench.report.tables.columns import COLUMNS
from peftbench.report.tables.table import collect_notes, render_table
from peftbench.report.text.escape import escaped_line
from peftbench.report.text.formatting import finite_or_none


def json_table(records: Sequence[RunRecord], summary: Sequence[str], note_lines: Sequence[str] | None = None) -> str:
    """Every figure of every run at full precision, with what the columns mean, the summary and the notes.

    ``told`` are the notes, where they are made already.
    """
    rows = sort_records(records)
    return (
        json.dumps(
            {
                "summary": list(summary),
                "notes": list(collect_notes(rows) if note_lines is None else note_lines),
                "columns": {column.title: column.description for column in COLUMNS},
                "runs": [
                    {
                        key: finite_or_none(value)
                        for column in COLUMNS
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
    r"""The comparison as a ``tabular`` with the rules of the package booktabs, for ``\input``."""
    made = render_table(records, "latex_booktabs", escaped_line)  # which escapes what LaTeX would take for its own
    made = re.sub(r"^(\s*)(?=[\[*])", r"\1{}", made, flags=re.MULTILINE)  # else an option of the \\ before it
    return "% needs \\usepackage{booktabs}; made by peftbench report\n" + made.replace("–", "--") + "\n"
