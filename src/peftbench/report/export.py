"""The comparison for other programs and other pages: JSON, and a table for LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from peftbench.record import RunRecord
from peftbench.report.columns import COLUMNS, finite
from peftbench.report.escape import one_line
from peftbench.report.table import laid_out, notes, ordered


def json_table(records: Sequence[RunRecord], summary: Sequence[str], told: Sequence[str] | None = None) -> str:
    """Every figure of every run at full precision, with what the columns mean, the summary and the notes.

    ``told`` are the notes, where they are made already.
    """
    rows = ordered(records)
    return json.dumps(
        {
            "summary": list(summary),
            "notes": list(notes(rows) if told is None else told),
            "columns": {column.title: column.meaning for column in COLUMNS},
            "runs": [
                {key: finite(value) for column in COLUMNS for key, value in column.raw(record).items()}
                | {
                    "started_at": record.started_at, "device": record.device.name, "commit": record.git,
                    "recipe_fingerprint": record.recipe_fingerprint, "recipe": record.recipe,
                }
                for record in rows
            ],
        },
        indent=1,
    ) + "\n"  # fmt: skip


def latex_table(records: Sequence[RunRecord]) -> str:
    r"""The comparison as a ``tabular`` with the rules of the package booktabs, for ``\input``."""
    made = laid_out(records, "latex_booktabs", one_line)  # which escapes what LaTeX would take for its own
    made = re.sub(r"^(\s*)(?=[\[*])", r"\1{}", made, flags=re.MULTILINE)  # else an option of the \\ before it
    return "% needs \\usepackage{booktabs}; made by peftbench report\n" + made.replace("–", "--") + "\n"
