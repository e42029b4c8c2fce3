"""Two suites side by side as a person reads them, in a terminal or a log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftbench.record import Interval
from peftbench.report.analysis.significance import ALPHA, MIN_EXAMPLES
from peftbench.report.diff.compute import DiffVerdict, MetricDiff, RunDiff, SuiteDiff, SuiteSide
from peftbench.report.diff.matching import SettingChange
from peftbench.report.diff.metrics import METRICS, OUTCOME_METRIC
from peftbench.report.tables.table import natural_width
from peftbench.report.text.escape import terminal_safe

_VERDICT_STYLES = {"regressed": "red", "missing": "red", "improved": "green"}
"""Beside the words, never instead of them."""


def print_diff(diff: SuiteDiff, console: Console | None = None) -> None:
    """Print what changed: config first, then a row for each run and figure that is not what it was."""
    console = console or Console()
    tables = [table for table in (_config_table(diff), _metrics_table(diff)) if table is not None]
    if not console.is_terminal:  # a file or a pipe has room
        width = max((natural_width(console, table) for table in tables), default=console.width)
        console = Console(file=console.file, width=max(width, console.width))
    _print_lines(console, header_lines(diff))
    for table in tables:
        console.print(table)
    _print_lines(console, footer_lines(diff))


def regression_summary(diff: SuiteDiff) -> str:
    """One sentence that names the figures of the runs that fell; there must be some."""
    runs = [
        f"{terminal_safe(pair.label)} ({'; '.join(_regression_phrases(pair))})" for pair in diff.runs if pair.regressed
    ]
    return f"fell by more than allowed: {', '.join(runs)}"


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def header_lines(diff: SuiteDiff) -> list[str]:
    """What the two are, and whether they are of two machines."""
    lines = [_side_line("A, before", diff.before), _side_line("B, after", diff.after)]
    if diff.different_devices:
        old, new = (terminal_safe(" and ".join(side.devices)) for side in (diff.before, diff.after))
        lines.append(f"times and memory are of two machines: A ran on {old}, B on {new}")
    return lines


def _side_line(title: str, side: SuiteSide) -> str:
    return f"{title}: {terminal_safe(side.folder)} ({side.num_runs} run{'s' * (side.num_runs != 1)})"


def footer_lines(diff: SuiteDiff) -> list[str]:
    """What is to be known of the figures, and that nothing changed or fell where that is so."""
    if not diff.changed:
        return ["nothing changed"]
    lines = []
    if any(
        figure.paired_interval and figure.paired_interval.interval and _has_changed(figure)
        for p in diff.runs
        for figure in p.metrics
    ):
        lines.append(interval_note(diff))
    reasons = {
        f.paired_interval.missing_reason
        for p in diff.runs
        for f in p.metrics
        if f.paired_interval and f.paired_interval.missing_reason and _has_changed(f)
    }
    lines += [f"no interval: {reason}" for reason in sorted(reason for reason in reasons if reason)]
    if not any(metric_cells(pair) for pair in diff.runs):
        lines.append("no figure changed")
    return lines if diff.regressed else [*lines, "nothing fell by more than its threshold"]


def interval_note(diff: SuiteDiff) -> str:
    """What the brackets hold, and of how many intervals all are to hold together."""
    paired = [figure.paired_interval for pair in diff.runs for figure in pair.metrics if figure.paired_interval]
    known = [one for one in paired if one.interval]
    together = f"all {len(known):,} hold together" if len(known) > 1 else "it holds"
    few = (
        f"; of fewer than {MIN_EXAMPLES} examples none is supported"
        if any(one.significant is None for one in known)
        else ""
    )
    return (
        f"in brackets: the difference's interval, paired over examples; {together} with {100 * (1 - ALPHA):.3g} %, and "
        f"{'they know' if len(known) > 1 else 'it knows'} nothing of seeds{few}"
    )


def config_rows(diff: SuiteDiff) -> list[tuple[SettingChange, str]]:
    """Each change once, with the names of the runs that have it; those of all runs come first."""
    runs: dict[str, tuple[SettingChange, list[str]]] = {}
    for pair in diff.runs:
        for change in pair.config_changes:
            runs.setdefault(change.model_dump_json(), (change, []))[1].append(pair.label)
    common = {change.model_dump_json() for change in diff.common_changes}
    own = [(change, ", ".join(labels)) for key, (change, labels) in runs.items() if key not in common]
    return [(change, "all") for change in diff.common_changes] + own


def config_cells(diff: SuiteDiff) -> Iterator[tuple[str, str, str, str]]:
    """Knob, value before, value after and the runs, of each change."""
    for change, runs in config_rows(diff):
        absent = {"A": ("", "not there"), "B": ("not there", "")}.get(change.only_in or "", ("", ""))
        yield change.key, absent[0] or _format_value(change.before), absent[1] or _format_value(change.after), runs


def _config_table(diff: SuiteDiff) -> Table | None:
    table = _new_table("config", ("knob", "before", "after", "in runs"))
    for cells in config_cells(diff):
        table.add_row(*(Text(terminal_safe(cell)) for cell in cells))
    return table if table.row_count else None


def _format_value(value: object) -> str:
    """Text as it is, anything else as JSON, as it would be written on a command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metrics_table(diff: SuiteDiff) -> Table | None:
    """One row a run and figure, the run's name beside the first of them."""
    table = _new_table("figures", ("run", "figure", "before", "after", "change", "verdict"))
    for column in table.columns[2:5]:
        column.justify = "right"
    for pair in diff.runs:
        for index, (cells, verdict) in enumerate(metric_cells(pair)):
            label = "" if index else terminal_safe(pair.label)
            last = Text(cells[-1], _VERDICT_STYLES.get(verdict, ""))
            table.add_row(Text(label), *(Text(cell) for cell in cells[:-1]), last)
        table.add_section()
    return table if table.row_count else None


def _new_table(title: str, column_titles: Sequence[str]) -> Table:
    table = Table(
        title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for name in column_titles:
        table.add_column(name, overflow="fold")
    return table


def metric_cells(run_diff: RunDiff) -> list[tuple[tuple[str, str, str, str, str], DiffVerdict]]:
    """Figure, before, after, change and verdict in words of each row that is worth showing, and the verdict."""
    if run_diff.after is None:
        return [(("", "", "", "", "fell: missing in B"), "regressed")]
    if run_diff.before is None:
        return [(("", "", "", "", "new in B"), "new")]
    rows: list[tuple[tuple[str, str, str, str, str], DiffVerdict]] = []
    for figure in visible_metrics(run_diff):
        before, after = format_metric_value(figure, figure.before), format_metric_value(figure, figure.after)
        rows.append(((figure.name, before, after, format_change(figure), describe_verdict(figure)), figure.verdict))
    return rows


def visible_metrics(run_diff: RunDiff) -> list[MetricDiff]:
    """Figures that are not what they were; of a run that ended otherwise, its outcome says what became of the rest."""
    outcome = [figure for figure in run_diff.metrics if figure.name == OUTCOME_METRIC and figure.verdict != "equal"]
    return outcome or [figure for figure in run_diff.metrics if _has_changed(figure)]


def _has_changed(metric: MetricDiff) -> bool:
    return metric.verdict != "equal"


def format_metric_value(metric: MetricDiff, value: float | str | None) -> str:
    """A figure's value as a person reads it, unit included."""
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else METRICS[metric.name].format_value(value)


def format_change(metric: MetricDiff) -> str:
    """A figure's relative change, and in brackets the interval of the difference in the figure's own unit."""
    interval = metric.paired_interval.interval if metric.paired_interval else None
    return _format_relative_change(metric) + (f" ({_format_interval(interval)})" if interval else "")


def _format_relative_change(metric: MetricDiff) -> str:
    if metric.relative_change is None:
        return "from zero" if metric.before == 0 and metric.after is not None else ""
    percent = 100 * metric.relative_change
    return f"{percent:+,.0f}%" if abs(percent) >= 1000 else f"{percent:+.3g}%"


def _format_interval(interval: Interval) -> str:
    return f"{interval.low:+.3g} to {interval.high:+.3g}"


def describe_verdict(metric: MetricDiff) -> str:
    """A figure's verdict in words, and for quality whether the examples support it."""
    if metric.name == OUTCOME_METRIC and metric.verdict == "regressed":
        return "fell: a run that did not end well has no other figures"
    threshold = f"{100 * (metric.threshold or 0):.4g}%"
    words = {
        "regressed": f"fell by more than {threshold}",
        "improved": f"gained more than {threshold}",
        "within": f"within {threshold}",
        "missing": "fell: not known any more",
        "new": "known only now",
        "not_reported": "not told by that device",
        "changed": "ended otherwise",
    }
    if metric.name == OUTCOME_METRIC and metric.verdict == "improved":
        return "improved"
    return ", ".join((words[metric.verdict], *_significance_phrases(metric)))


def _significance_phrases(metric: MetricDiff) -> Iterator[str]:
    """Whether the examples bear a change in quality out."""
    if metric.paired_interval is not None:
        unsaid = "no interval" if metric.paired_interval.interval is None else "too few examples to support it"
        said = {True: "supported by the interval", False: "not supported by the interval", None: unsaid}
        yield said[metric.paired_interval.significant]


def _regression_phrases(run_diff: RunDiff) -> list[str]:
    """What fell of a run, in words."""
    if run_diff.after is None:
        return ["missing in B"]
    found = []
    for figure in visible_metrics(run_diff):
        if figure.name == OUTCOME_METRIC and figure.regressed:
            found.append(f"{OUTCOME_METRIC} {figure.before}, now {figure.after}")
        elif figure.verdict == "missing":
            found.append(f"{figure.name} not known any more")
        elif figure.regressed:
            found.append(
                ", ".join((f"{figure.name} {_format_relative_change(figure)}", *_significance_phrases(figure)))
            )
    return found
