"""The comparison table, for the terminal, in Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tabulate import tabulate

from peftbench.errors import RecordError
from peftbench.files import write_atomically
from peftbench.plausibility import implausible
from peftbench.record import RunRecord
from peftbench.report.columns import COLUMNS, FIRST_TO_GO, Column, method_label
from peftbench.report.ends import shortage
from peftbench.report.groups import by_knob, over_seeds
from peftbench.report.protocol import unequal

_ENDLESS = 10_000  # characters: more than any table takes


def ordered(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Baselines first, then by trained parameters, then by name."""
    return sorted(records, key=lambda r: (r.parameters.trainable if r.parameters else -1, r.name))


def shown(records: Sequence[RunRecord]) -> list[Column]:
    """The columns that these records fill."""
    return [
        column for column in COLUMNS
        if not column.optional or any(column.text(record) != "–" for record in records)
    ]  # fmt: skip


def print_table(records: Sequence[RunRecord], title: str, console: Console | None = None) -> None:
    """Print the comparison, and what differs between seeds where several were run.

    Columns that a narrow terminal has no room for are left to the report, which is said.
    """
    console = console or Console()
    rows, columns, left_out = ordered(records), shown(records), list[str]()
    if not console.is_terminal:  # a file or a pipe has room
        console = Console(file=console.file, width=natural_width(console, _terminal_table(rows, columns, title)))
    while natural_width(console, _terminal_table(rows, columns, title)) > console.width:
        spare = [column for title in FIRST_TO_GO for column in columns if column.title == title]
        if not spare:
            break
        columns.remove(spare[0])
        left_out.append(spare[0].title)
    console.print(_terminal_table(rows, columns, title))
    if left_out:
        console.print(f"(no room here for {', '.join(left_out)}: see the report)", markup=False, highlight=False)
    for note in notes(rows):
        console.print(f"note: {note}", markup=False, highlight=False)
    if over_seeds(rows):
        console.print(tabulate(over_seeds(rows), headers="keys", tablefmt="simple"), markup=False, highlight=False)


def natural_width(console: Console, table: Table) -> int:
    """What a table would take, in characters, if nothing in it had to be folded."""
    return console.measure(table, options=console.options.update_width(_ENDLESS)).maximum


def _terminal_table(rows: Sequence[RunRecord], columns: Sequence[Column], title: str) -> Table:
    table = Table(
        title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for index, column in enumerate(columns):
        edge = index in (0, len(columns) - 1)
        table.add_column(column.title.replace(" ", "\n"), justify="left" if edge else "right", overflow="fold")
    for record in rows:
        name, *figures = (column.text(record) for column in columns)
        # The interval goes below the mean, which keeps the table within a terminal.
        table.add_row(name, *(figure.replace(" (", "\n(") for figure in figures))
    return table


def notes(records: Sequence[RunRecord]) -> list[str]:
    """What a reader must know beside the figures: what was unequal, what was used instead, what was noticed."""
    found = [f"{record.name}: {shortage(record.outcome)}" for record in records if record.outcome.kind == "oom"]
    found += [f"{record.name}: {note}" for record in records for note in record.notes]
    trained = [record for record in records if record.tokens is not None and record.outcome.kind == "ok"]
    if unequal(trained):
        found.append(
            "these runs differ in more than their method: batches, steps, examples or lengths are not the same"
        )
    judged = {(r.quality.split, r.quality.examples, r.data_identity) for r in records if r.quality is not None}
    if len(judged) > 1:
        found.append("these runs were not evaluated on the same examples")
    return [*found, *implausible(records), *_unknown(trained)]


def _unknown(trained: Sequence[RunRecord]) -> list[str]:
    """Why figures are unknown that nothing here tells."""
    measured = [record for record in trained if record.throughput is not None]
    found = {
        f"MFU is unknown: the data sheet's FLOP/s of {record.device.name or 'this device'} at "
        f"{record.recipe['train']['precision']} are not in the table"
        for record in measured if record.compute.peak_per_second is None
    }  # fmt: skip
    if any(record.energy_joules is None for record in measured):
        found.add("energy is unknown: neither NVML nor RAPL tells it here")
    return sorted(found)


def markdown_table(records: Sequence[RunRecord]) -> str:
    """The comparison as a Markdown table."""
    columns = shown(records)
    cells = [[column.text(record).replace("|", "\\|") for column in columns] for record in ordered(records)]
    align = ["left", *["right"] * (len(columns) - 2), "left"]
    return tabulate(cells, headers=[c.title for c in columns], tablefmt="github", colalign=align, disable_numparse=True)


def csv_table(records: Sequence[RunRecord]) -> str:
    """Every column's raw values, full precision, optional ones included; empty where unknown."""
    rows = [{k: v for column in COLUMNS for k, v in column.raw(record).items()} for record in ordered(records)]
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_report(records: Sequence[RunRecord], title: str, summary: Sequence[str]) -> str:
    """The whole report: in words, table, notes, what the columns mean, what was compared, sample summaries."""
    rows = ordered(records)
    parts = [f"# {title}", "\n".join(f"- {sentence}" for sentence in summary), markdown_table(records)]
    if seeds := over_seeds(rows):
        parts += ["## Over seeds", _github(seeds)]
    if found := notes(rows):
        parts += ["## Notes", "\n".join(f"- {note}" for note in found)]
    parts += ["## Columns", "\n".join(f"- **{column.title}**: {column.meaning}" for column in shown(records))]
    parts += ["## Where and with what", "\n".join(_origin(records))]
    if samples := _samples(rows):
        parts += ["## The same example, by every run", *samples]
    return "\n\n".join(parts) + "\n"


def _origin(records: Sequence[RunRecord]) -> list[str]:
    lines = {
        f"- {r.device.name} ({r.device.kind}, {r.device.processes} process{'es' * (r.device.processes > 1)}), "
        f"torch {r.versions.get('torch', 'unknown')}, transformers {r.versions.get('transformers', 'unknown')}, "
        f"peft {r.versions.get('peft', 'unknown')}; data {r.data_identity}; examples {r.examples}"
        for r in records
    }  # fmt: skip
    return sorted(lines)


def _samples(records: Sequence[RunRecord]) -> list[str]:
    with_samples = [record for record in records if record.quality and record.quality.samples]
    if not with_samples:
        return []
    first = with_samples[0].quality.samples[0]  # type: ignore[union-attr]
    lines = [["reference", first.reference]]
    for record in with_samples:
        same = [sample for sample in record.quality.samples if sample.id == first.id]  # type: ignore[union-attr]
        lines += [[method_label(record), sample.generated] for sample in same]
    quoted = "\n".join(f"> {line}" for line in first.article.splitlines())
    cells = [[name, " ".join(text.split()).replace("|", "\\|")] for name, text in lines]
    return [f"`{first.id}`", quoted, tabulate(cells, headers=["run", "summary"], tablefmt="github")]


def insert_table(records: Sequence[RunRecord], file: Path, block: str, knob: str | None = None) -> None:
    """Replace what stands in ``file`` between the markers of ``block`` by the table, so that no figure is typed.

    With ``knob`` it is the table of the loss by that knob; with runs of several seeds, the one over seeds.

    Raises:
        RecordError: the file has no such markers.
        UnknownKeyError: the recipes have no such knob.
    """
    grouped = by_knob(records, knob) if knob else over_seeds(ordered(records))
    insert_block(_github(grouped) if grouped else markdown_table(records), file, block)


def insert_block(made: str, file: Path, block: str) -> None:
    """Replace what stands in ``file`` between the markers of ``block`` by what was made.

    Raises:
        RecordError: the file has no such markers.
    """
    begin, end = f"<!-- report:{block} -->", f"<!-- end of report:{block} -->"
    try:
        text = file.read_text(encoding="utf-8")
        before, rest = text.split(begin, 1)
        _, after = rest.split(end, 1)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{file} has no place for the table; put the lines {begin} and {end} where it shall go"
        ) from error
    write_atomically(file, f"{before}{begin}\n\n{made}\n\n{end}{after}")


def _github(rows: Sequence[dict[str, str]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
