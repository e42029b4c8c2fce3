"""The comparison for other programs and other pages: JSON, and a table for LaTeX."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from tabulate import tabulate

from peftbench.record import RunRecord
from peftbench.report.columns import COLUMNS, Raw
from peftbench.report.table import notes, ordered, shown


def json_table(records: Sequence[RunRecord], summary: Sequence[str]) -> str:
    """Every figure of every run at full precision, with what the columns mean, the summary and the notes."""
    rows = ordered(records)
    return json.dumps(
        {
            "summary": list(summary),
            "notes": notes(rows),
            "columns": {column.title: column.meaning for column in COLUMNS},
            "runs": [
                {key: _known(value) for column in COLUMNS for key, value in column.raw(record).items()}
                | {
                    "started_at": record.started_at, "device": record.device.name, "commit": record.git,
                    "recipe_fingerprint": record.recipe_fingerprint, "recipe": record.recipe,
                }
                for record in rows
            ],
        },
        indent=1,
    ) + "\n"  # fmt: skip


def _known(value: Raw) -> Raw:
    """None for a float that is no number, of which JSON knows nothing."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def latex_table(records: Sequence[RunRecord]) -> str:
    r"""The comparison as a ``tabular`` with the rules of the package booktabs, for ``\input``."""
    columns = shown(records)
    cells = [[column.text(record) for column in columns] for record in ordered(records)]
    align = ["left", *["right"] * (len(columns) - 2), "left"]
    made = tabulate(
        cells, headers=[c.title for c in columns], tablefmt="latex_booktabs", colalign=align, disable_numparse=True
    )
    return "% needs \\usepackage{booktabs}; made by peftbench report\n" + made.replace("–", "--") + "\n"
