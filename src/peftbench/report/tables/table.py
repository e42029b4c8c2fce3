"""The comparison table for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from peftbench.common.filesystem import write_atomically
from peftbench.errors import RecordError
from peftbench.record import RunRecord
from peftbench.record.sanity_checks import check_step_times
from peftbench.report.analysis.comparability import list_protocol_differences
from peftbench.report.analysis.examples import describe_changed_examples, describe_overlap
from peftbench.report.analysis.outcomes import oom_sentence
from peftbench.report.runs import run_label, sample_key, sort_records
from peftbench.report.tables.columns import Column, build_columns, build_drop_order
from peftbench.report.tables.pivot import rows_by_setting, seed_rows
from peftbench.report.text.escape import escape_markdown, escape_spreadsheet_formula, terminal_safe
from peftbench.report.text.formatting import join_with_and, truncate_list

_UNBOUNDED_WIDTH = 10_000  # characters, wider than any table
_COLUMN_GAP = 2  # characters after each column of the terminal table


def visible_columns(records: Sequence[RunRecord]) -> list[Column]:
    """Return the columns that are not empty for these records."""
    return [
        column
        for column in build_columns(records)
        if not column.optional or any(column.format_text(record) != "–" for record in records)
    ]


def print_table(
    records: Sequence[RunRecord], title: str, console: Console | None = None, note_lines: Sequence[str] | None = None
) -> None:
    """Print the comparison, the notes, and statistics over seeds if there are several.

    On a narrow terminal some columns are dropped; their names are printed. ``note_lines`` avoids collecting the notes
    again.
    """
    console = console or Console()
    rows = sort_records(records)
    cells = {
        column.title: [terminal_safe(column.format_text(record)) for record in rows]
        for column in visible_columns(records)
    }
    for column in list(cells)[1:]:  # intervals on a second line keep the table narrow
        cells[column] = [cell.replace(" (", "\n(") for cell in cells[column]]
    dropped = _drop_columns(cells, build_drop_order(records), console.width) if console.is_terminal else []
    if not console.is_terminal:  # a file or a pipe has no width limit
        console = Console(file=console.file, width=_table_width(cells))
    console.print(_rich_table(cells, title))
    lines = [f"(columns that do not fit: {', '.join(dropped)}; see the report)"] if dropped else []
    lines += [f"note: {terminal_safe(note)}" for note in (collect_notes(rows) if note_lines is None else note_lines)]
    if seeds := seed_rows(rows):
        lines.append(terminal_table(seeds))
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def natural_width(console: Console, table: Table) -> int:
    """Return the width of a table in characters without folding."""
    return console.measure(table, options=console.options.update_width(_UNBOUNDED_WIDTH)).maximum


def _drop_columns(cells: dict[str, list[str]], drop_order: Sequence[str], width: int) -> list[str]:
    """Remove columns in ``drop_order`` until the table fits; return their titles."""
    dropped = []
    for title in drop_order:
        if _table_width(cells) <= width:
            break
        if cells.pop(title, None) is not None:
            dropped.append(title)
    return dropped


def _table_width(cells: Mapping[str, Sequence[str]]) -> int:
    """Return ``natural_width`` of the table, computed directly: rich needs a second for a thousand rows."""
    lines = [
        [line for cell in (title.replace(" ", "\n"), *column) for line in cell.split("\n")]
        for title, column in cells.items()
    ]
    return sum(max(map(cell_len, column)) + _COLUMN_GAP for column in lines)


def _rich_table(cells: Mapping[str, Sequence[str]], title: str) -> Table:
    table = Table(
        title=Text(terminal_safe(title), "table.title"),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, column in enumerate(cells):
        edge = index in (0, len(cells) - 1)
        table.add_column(column.replace(" ", "\n"), justify="left" if edge else "right", overflow="fold")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, row))  # as Text: a name may contain rich markup
    return table


def terminal_table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows with equal keys as a table for a terminal."""
    heads = [terminal_safe(head) for head in rows[0]]
    return tabulate(
        [[terminal_safe(cell) for cell in row.values()] for row in rows], heads, "simple", disable_numparse=True
    )


def collect_notes(records: Sequence[RunRecord]) -> list[str]:
    """Return notes that a reader needs: unequal protocols, substitutions, failures, suspicious step times."""
    notes = group_notes(records, describe_overlap)
    notes += [f"{record.name}: {oom_sentence(record)}" for record in records if record.outcome.kind == "oom"]
    notes += group_notes(records, describe_changed_examples)
    notes += group_notes(records, lambda record: record.notes)
    trained = [record for record in records if record.tokens is not None and record.outcome.kind == "ok"]
    if differences := list_protocol_differences(trained):
        notes.append(f"these runs differ in more than their method: in {join_with_and(differences)}")
    evaluated = {
        (r.quality.split, r.quality.num_examples, r.data_fingerprint) for r in records if r.quality is not None
    }
    if len(evaluated) > 1:
        notes.append("these runs were not evaluated on the same examples")
    return [*notes, *check_step_times(records), *_unknown_metric_notes(trained)]


def group_notes(records: Sequence[RunRecord], get_notes: Callable[[RunRecord], Iterable[str]]) -> list[str]:
    """Return the notes that ``get_notes`` has for the records, each once, with the names of its runs."""
    names_by_note: dict[str, list[str]] = {}
    for record in records:
        for note in get_notes(record):
            names_by_note.setdefault(note, []).append(record.name)
    return [
        f"{'all runs' if len(names) == len(records) > 1 else join_with_and(truncate_list(names))}: {note}"
        for note, names in names_by_note.items()
    ]


def _unknown_metric_notes(records: Sequence[RunRecord]) -> list[str]:
    """Return why MFU or energy are unknown."""
    measured = [record for record in records if record.throughput is not None]
    notes = {
        f"MFU is unknown: no data sheet FLOP/s for {record.device.name or 'this device'} at "
        f"{record.recipe['train']['precision']}"
        for record in measured
        if record.compute.peak_flops_per_second is None
    }
    if any(record.energy_joules is None for record in measured):
        notes.add("energy is unknown: neither NVML nor RAPL is available")
    return sorted(notes)


def markdown_table(records: Sequence[RunRecord]) -> str:
    """Return the comparison as a Markdown table."""
    return render_table(records, "github", escape_markdown)


def render_table(records: Sequence[RunRecord], table_format: str, escape: Callable[[str], str]) -> str:
    """Return the comparison in tabulate's ``table_format``, with escaped texts and right-aligned numbers."""
    columns = visible_columns(records)
    cells = [[escape(column.format_text(record)) for column in columns] for record in sort_records(records)]
    align = ["left", *["right"] * (len(columns) - 2), "left"]
    heads = [escape(column.title) for column in columns]
    return tabulate(cells, headers=heads, tablefmt=table_format, colalign=align, disable_numparse=True)


def csv_table(records: Sequence[RunRecord]) -> str:
    """Return the raw values of every column at full precision, optional columns included; unknown values are empty.

    Strings are quoted, so that a spreadsheet that splits at semicolons does not split them.
    """
    columns = build_columns(records)
    rows = [
        {k: v for column in columns for k, v in column.raw_values(record).items()} for record in sort_records(records)
    ]
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(
        {k: escape_spreadsheet_formula(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows
    )
    return text.getvalue()


def markdown_report(
    records: Sequence[RunRecord],
    title: str,
    summary: Sequence[str],
    note_lines: Sequence[str] | None = None,
    unfinished_lines: Sequence[str] = (),
) -> str:
    """Return the report: summary, table, notes, column descriptions, environment and sample texts.

    ``note_lines`` avoids collecting the notes again. ``unfinished_lines`` name the runs without a result.
    """
    rows = sort_records(records)
    parts = [f"# {escape_markdown(title)}", _bullet_list(summary), markdown_table(records)]
    if unfinished_lines:
        parts += ["## Unfinished runs", _bullet_list(unfinished_lines)]
    if seeds := seed_rows(rows):
        parts += ["## Over seeds", _github_table(seeds)]
    if notes := collect_notes(rows) if note_lines is None else note_lines:
        parts += ["## Notes", _bullet_list(notes)]
    descriptions = (
        f"- **{escape_markdown(column.title)}**: {escape_markdown(column.description)}"
        for column in visible_columns(records)
    )
    parts += ["## Columns", "\n".join(descriptions)]
    parts += ["## Environment", _bullet_list(_environment_lines(records))]
    if samples := _sample_sections(rows):
        parts += ["## Example: texts of every run", *samples]
    return "\n\n".join(parts) + "\n"


def _bullet_list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escape_markdown(sentence)}" for sentence in sentences)


def _environment_lines(records: Sequence[RunRecord]) -> list[str]:
    lines = {
        f"{r.device.name} ({r.device.type}, {r.device.num_processes} process{'es' * (r.device.num_processes > 1)}), "
        + ", ".join(f"{name} {r.library_versions.get(name, 'unknown')}" for name in ("torch", "transformers", "peft"))
        + f"; data {r.data_fingerprint}; examples {r.num_examples}"
        for r in records
    }
    return sorted(lines)


def _sample_sections(records: Sequence[RunRecord]) -> list[str]:
    with_samples = [record for record in records if record.quality and record.quality.samples]
    if not with_samples:
        return []
    first = with_samples[0].quality.samples[0]  # type: ignore[union-attr]
    lines = [["reference", first.reference]]
    for record in with_samples:
        same = [sample for sample in record.quality.samples if sample_key(sample) == sample_key(first)]  # type: ignore[union-attr]
        lines += [[run_label(record), sample.generated] for sample in same]
    quoted = "\n".join(f"> {escape_markdown(line)}".rstrip() for line in first.prompt.splitlines())
    cells = [[escape_markdown(text) for text in line] for line in lines]
    table = tabulate(cells, headers=["run", "text"], tablefmt="github", disable_numparse=True)
    return [escape_markdown(first.id), quoted, table]


def insert_table(records: Sequence[RunRecord], file: Path, marker: str, group_by: str | None = None) -> None:
    """Replace the section ``marker`` of ``file`` with the table, so that no number is typed by hand.

    With ``group_by``, insert the losses by that key; with several seeds, the statistics over seeds.

    Raises:
        RecordError: the file has no such markers.
        UnknownKeyError: the recipes lack the key.
    """
    grouped = rows_by_setting(records, group_by) if group_by else seed_rows(sort_records(records))
    insert_block(_github_table(grouped) if grouped else markdown_table(records), file, marker)


def insert_block(content: str, file: Path, marker: str) -> None:
    """Replace the section ``marker`` of ``file`` with ``content``.

    Raises:
        RecordError: the file has no such markers.
    """
    begin, end = f"<!-- report:{marker} -->", f"<!-- end of report:{marker} -->"
    try:
        text = file.read_text(encoding="utf-8")
        before, rest = text.split(begin, 1)
        _, after = rest.split(end, 1)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{file} has no section {marker!r}; add the lines {begin} and {end} where the table belongs"
        ) from error
    write_atomically(file, f"{before}{begin}\n\n{content}\n\n{end}{after}")


def _github_table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows with equal keys as Markdown. Only the method is escaped: the other cells may be bold."""
    heads = [escape_markdown(head) for head in rows[0]]
    cells = [[escape_markdown(cell) if key == "method" else cell for key, cell in row.items()] for row in rows]
    return tabulate(cells, headers=heads, tablefmt="github", disable_numparse=True)
