"""Text of a comparison of two result folders, for a terminal or a log."""

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
from peftbench.report.diff.metrics import OUTCOME_METRIC
from peftbench.report.tables.table import natural_width
from peftbench.report.text.escape import terminal_safe

_VERDICT_STYLES = {"regressed": "red", "missing": "red", "improved": "green"}
"""Colors in addition to the text, never instead of it."""


def print_diff(diff: SuiteDiff, console: Console | None = None) -> None:
    """Print the changed settings, then a row for each run and changed metric."""
    console = console or Console()
    tables = [table for table in (_config_table(diff), _metrics_table(diff)) if table is not None]
    if not console.is_terminal:  # a file or a pipe has no width limit
        width = max((natural_width(console, table) for table in tables), default=console.width)
        console = Console(file=console.file, width=max(width, console.width))
    _print_lines(console, header_lines(diff))
    for table in tables:
        console.print(table)
    _print_lines(console, footer_lines(diff))


def regression_summary(diff: SuiteDiff) -> str:
    """Return one sentence that names the regressed metrics of each run; requires a regression."""
    runs = [
        f"{terminal_safe(pair.label)} ({'; '.join(_regression_phrases(pair))})" for pair in diff.runs if pair.regressed
    ]
    return f"regressed beyond the threshold: {', '.join(runs)}"


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def header_lines(diff: SuiteDiff) -> list[str]:
    """Return both folders, the records that cannot be read, and a warning if the devices differ."""
    lines = [_side_line("A, before", diff.before), _side_line("B, after", diff.after)]
    lines += [
        f"not compared, in {name}: {terminal_safe(sentence)}"
        for name, side in (("A", diff.before), ("B", diff.after))
        for sentence in side.unreadable
    ]
    if diff.different_devices:
        old, new = (terminal_safe(" and ".join(side.devices)) for side in (diff.before, diff.after))
        lines.append(f"times and memory are from different devices: A ran on {old}, B on {new}")
    return lines


def _side_line(title: str, side: SuiteSide) -> str:
    return f"{title}: {terminal_safe(side.folder)} ({side.num_runs} run{'s' * (side.num_runs != 1)})"


def footer_lines(diff: SuiteDiff) -> list[str]:
    """Return notes on the intervals, and that nothing changed or regressed if so."""
    if not diff.changed:
        return ["nothing changed"]
    lines = []
    if any(
        metric.paired_interval and metric.paired_interval.interval and _has_changed(metric)
        for run in diff.runs
        for metric in run.metrics
    ):
        lines.append(interval_note(diff))
    reasons = {
        metric.paired_interval.missing_reason
        for run in diff.runs
        for metric in run.metrics
        if metric.paired_interval and metric.paired_interval.missing_reason and _has_changed(metric)
    }
    lines += [f"no interval: {reason}" for reason in sorted(reason for reason in reasons if reason)]
    if not any(metric_cells(pair) for pair in diff.runs):
        lines.append("no metric changed")
    return lines if diff.regressed else [*lines, "no metric regressed beyond its threshold"]


def interval_note(diff: SuiteDiff) -> str:
    """Return what the brackets contain, and the simultaneous confidence of the intervals."""
    paired = [metric.paired_interval for run in diff.runs for metric in run.metrics if metric.paired_interval]
    known = [one for one in paired if one.interval]
    scope = f"for all {len(known):,} simultaneously" if len(known) > 1 else ""
    too_few = (
        f"; with fewer than {MIN_EXAMPLES} examples no change is called significant"
        if any(one.significant is None for one in known)
        else ""
    )
    return (
        f"in brackets: interval of the difference, paired over examples, with {100 * (1 - ALPHA):.3g} % confidence"
        f"{' ' * bool(scope)}{scope}; it does not include the variation between seeds{too_few}"
    )


def config_rows(diff: SuiteDiff) -> list[tuple[SettingChange, str]]:
    """Return each change once, with the names of its runs; changes of all runs come first."""
    runs: dict[str, tuple[SettingChange, list[str]]] = {}
    for pair in diff.runs:
        for change in pair.config_changes:
            runs.setdefault(change.model_dump_json(), (change, []))[1].append(pair.label)
    common = {change.model_dump_json() for change in diff.common_changes}
    own = [(change, ", ".join(labels)) for key, (change, labels) in runs.items() if key not in common]
    return [(change, "all") for change in diff.common_changes] + own


def config_cells(diff: SuiteDiff) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, value before, value after and runs of each change."""
    for change, runs in config_rows(diff):
        absent = {"A": ("", "not set"), "B": ("not set", "")}.get(change.only_in or "", ("", ""))
        yield change.key, absent[0] or _format_value(change.before), absent[1] or _format_value(change.after), runs


def _config_table(diff: SuiteDiff) -> Table | None:
    table = _new_table("changed settings", ("key", "before", "after", "in runs"))
    for cells in config_cells(diff):
        table.add_row(*(Text(terminal_safe(cell)) for cell in cells))
    return table if table.row_count else None


def _format_value(value: object) -> str:
    """Return text unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metrics_table(diff: SuiteDiff) -> Table | None:
    """Return a table with a row for each run and changed metric; the name is in the run's first row."""
    table = _new_table("changed metrics", ("run", "metric", "before", "after", "change", "verdict"))
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
    """Return cells (metric, before, after, change, verdict text) and verdict of each shown row."""
    if run_diff.after is None:
        return [(("", "", "", "", "regressed: run is missing in B"), "regressed")]
    if run_diff.before is None:
        return [(("", "", "", "", "new in B"), "new")]
    rows: list[tuple[tuple[str, str, str, str, str], DiffVerdict]] = []
    for metric in visible_metrics(run_diff):
        cells = (metric.name, metric.before_text, metric.after_text, format_change(metric), describe_verdict(metric))
        rows.append((cells, metric.verdict))
    return rows


def visible_metrics(run_diff: RunDiff) -> list[MetricDiff]:
    """Return the changed metrics; only the outcome if it changed, because it explains the others."""
    outcome = [metric for metric in run_diff.metrics if metric.name == OUTCOME_METRIC and metric.verdict != "equal"]
    return outcome or [metric for metric in run_diff.metrics if _has_changed(metric)]


def _has_changed(metric: MetricDiff) -> bool:
    return metric.verdict != "equal"


def format_change(metric: MetricDiff) -> str:
    """Format a metric's relative change, with the interval of the difference (in its unit) in brackets."""
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
    """Return the text of a verdict, for quality with its significance."""
    if metric.name == OUTCOME_METRIC and metric.verdict == "regressed":
        return "regressed: the run has no metrics without outcome ok"
    threshold = f"{100 * (metric.threshold or 0):.4g}%"
    texts = {
        "regressed": f"regressed by more than {threshold}",
        "improved": f"improved by more than {threshold}",
        "within": f"within {threshold}",
        "missing": "regressed: no longer known",
        "new": "not known before",
        "not_reported": "not measurable on that device",
        "changed": "different outcome",
    }
    if metric.name == OUTCOME_METRIC and metric.verdict == "improved":
        return "improved"
    return ", ".join((texts[metric.verdict], *_significance_phrases(metric)))


def _significance_phrases(metric: MetricDiff) -> Iterator[str]:
    """Yield whether the examples support a change in quality."""
    if metric.paired_interval is not None:
        unknown = "no interval" if metric.paired_interval.interval is None else "too few examples"
        texts = {True: "significant", False: "not significant", None: unknown}
        yield texts[metric.paired_interval.significant]


def _regression_phrases(run_diff: RunDiff) -> list[str]:
    """Return a phrase for each regressed metric of a run."""
    if run_diff.after is None:
        return ["missing in B"]
    phrases = []
    for metric in visible_metrics(run_diff):
        if metric.name == OUTCOME_METRIC and metric.regressed:
            phrases.append(f"{OUTCOME_METRIC} {metric.before}, now {metric.after}")
        elif metric.verdict == "missing":
            phrases.append(f"{metric.name} no longer known")
        elif metric.regressed:
            phrases.append(
                ", ".join((f"{metric.name} {_format_relative_change(metric)}", *_significance_phrases(metric)))
            )
    return phrases
