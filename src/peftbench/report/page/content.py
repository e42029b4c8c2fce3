"""What the page says, section by section, before it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peftbench.record import RunRecord
from peftbench.report.analysis.comparability import why_not_comparable
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.analysis.significance import ComparisonSet, PairComparison, compare_groups
from peftbench.report.page import charts, memory_chart, series
from peftbench.report.page.charts import Chart
from peftbench.report.page.series import ChartRow, ColorGroups
from peftbench.report.reproduce import reproduce_commands
from peftbench.report.runs import method_kind, run_label, sample_key, sort_records
from peftbench.report.settings import Setting, environment_settings, recipe_settings
from peftbench.report.tables.columns import Column, format_outcome
from peftbench.report.tables.table import collect_notes, visible_columns
from peftbench.report.text.formatting import CellValue, decimal_places, finite_or_none, format_decimal, round_outward

MAX_DRAWN_RUNS = 24
"""Runs whose curves, bars and summaries are drawn, at most; all are in the table, the trade-offs and the data."""

MAX_NOTES = 60
"""Notes that are shown, at most."""


@dataclass(frozen=True)
class TableCell:
    """What a person reads, and what a column is sorted by."""

    text: str
    sort_value: CellValue


@dataclass(frozen=True)
class TableRow:
    """A run's row of the table."""

    outcome: str
    cells: list[TableCell]


@dataclass(frozen=True)
class ExampleSummaries:
    """One example, with what each run made of it."""

    id: str
    article: str
    reference: str
    generated: dict[str, str]


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that has no result yet."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class ComparisonRow:
    """A comparison of two configurations."""

    first: str
    second: str
    difference: str
    interval: str
    verdict: str


@dataclass(frozen=True)
class PageData:
    """All that the page shows."""

    title: str
    summary: list[str]
    columns: list[Column]
    rows: list[TableRow]
    trade_off_charts: list[Chart]
    memory_chart: Chart | None
    loss_charts: list[Chart]
    throughput_chart: Chart | None
    examples: list[ExampleSummaries]
    equal_settings: list[Setting]
    differing_settings: list[Setting]
    notes: list[str]
    environment: list[Setting]
    reproduce_commands: dict[str, list[str]]
    drawn_runs_note: str
    """Which runs the charts show, where it is not all."""
    has_pareto_front: bool
    """Whether a Pareto front is drawn."""
    uses_rouge: bool
    """Whether quality is ROUGE-L, or the held-out loss."""
    undrawn_runs: list[str]
    """Runs without a quality, and why, which a trade-off cannot show."""
    unfinished_runs: list[UnfinishedRun]
    comparisons: list[ComparisonRow]
    metric_name: str
    """What the pairs are compared by."""

    max_curve_points: ClassVar[int] = series.MAX_CURVE_POINTS
    smoothing_window: ClassVar[int] = 2 * charts.SMOOTHING_RADIUS + 1

    @property
    def better_direction(self) -> str:
        """Where in a trade-off the good runs lie."""
        return "Further up and further left is better" + ("." if self.uses_rouge else ": a loss falls upwards.")

    @property
    def all_charts(self) -> list[Chart]:
        """Every chart, in the page's order."""
        found = [*self.trade_off_charts, self.memory_chart, *self.loss_charts, self.throughput_chart]
        return [drawing for drawing in found if drawing is not None]


def build_page_data(
    records: Mapping[Path, RunRecord],
    title: str,
    summary: Sequence[str],
    *,
    comparison_set: ComparisonSet | None = None,
    note_lines: Sequence[str] | None = None,
    unfinished_runs: Sequence[UnfinishedRun] = (),
) -> PageData:
    """What the page says of ``records``, by the paths of their files.

    ``compared`` is what ``differences`` made of them, and ``told`` their notes, where these were made already.
    """
    rows = sort_records(list(records.values()))
    columns, drawn = visible_columns(rows), select_drawn_runs(rows)
    comparison_set = comparison_set or compare_groups(rows)
    place = {id(record): number for number, record in enumerate(rows)}
    groups = ColorGroups.from_run_groups(sorted(comparison_set.groups, key=lambda one: place[id(one.runs[0])]))
    by_rouge = comparison_set.metric is not None and comparison_set.metric.key == "rougeL"
    points = series.trade_off_rows(comparison_set.groups, groups, uses_rouge=by_rouge)
    all_knobs, note_lines = recipe_settings(rows), collect_notes(rows) if note_lines is None else note_lines
    found_at = {id(record): path for path, record in records.items()}
    return PageData(
        title=title,
        summary=list(summary),
        columns=columns,
        rows=[_build_table_row(record, columns) for record in rows],
        trade_off_charts=_trade_off_charts(points, groups, comparison_set.groups, uses_rouge=by_rouge),
        memory_chart=_memory_chart(_add_oom_runs(drawn, rows)),
        loss_charts=charts.loss_curves(series.loss_curve_rows(drawn, groups), groups),
        throughput_chart=charts.throughput_chart(series.throughput_rows(drawn, groups), groups),
        examples=_collect_examples(drawn),
        equal_settings=[knob for knob in all_knobs if knob.is_constant],
        differing_settings=[knob for knob in all_knobs if not knob.is_constant],
        notes=[
            *note_lines[:MAX_NOTES],
            *([f"and {len(note_lines) - MAX_NOTES} more, in the data"] if len(note_lines) > MAX_NOTES else []),
        ],
        environment=environment_settings(rows),
        reproduce_commands={run_label(record): reproduce_commands(record, found_at[id(record)]) for record in rows},
        drawn_runs_note=_drawn_runs_note(drawn, rows),
        has_pareto_front=_has_comparable_costs(comparison_set.groups),
        uses_rouge=by_rouge,
        undrawn_runs=_list_undrawn_runs(points, comparison_set.groups),
        unfinished_runs=list(unfinished_runs),
        comparisons=[_build_comparison_row(one) for one in comparison_set.pair_comparisons],
        metric_name=comparison_set.metric.name if comparison_set.metric else "",
    )


def select_drawn_runs(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs that are drawn: all, or the best of each method and then the best of all, in the table's order."""
    if len(records) <= MAX_DRAWN_RUNS:
        return list(records)
    by_quality = sorted(records, key=_quality_rank)
    first = {method_kind(record): record for record in reversed(by_quality)}
    taken = list(dict.fromkeys(map(id, [*first.values(), *by_quality])))[:MAX_DRAWN_RUNS]
    return [record for record in records if id(record) in taken]


def _quality_rank(record: RunRecord) -> tuple[bool, bool, float, float]:
    """Smaller is better: ended well, with ROUGE-L, by that, then by held-out loss."""
    score, loss = series.rouge_l_interval(record), finite_or_none(record.quality.loss if record.quality else None)
    by_score = -(score.mean if score else 0.0)
    return record.outcome.kind != "ok", score is None, by_score, float("inf") if loss is None else loss


def _add_oom_runs(drawn: Sequence[RunRecord], records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those that are drawn, and what did not fit, which a chart of memory is for."""
    there = {id(record) for record in drawn}
    refused = [record for record in records if record.outcome.kind == "oom" and id(record) not in there]
    return [*drawn, *refused[:MAX_DRAWN_RUNS]]


def _drawn_runs_note(drawn: Sequence[RunRecord], records: Sequence[RunRecord]) -> str:
    if len(drawn) == len(records):
        return ""
    return f"Of {len(records):,} runs {len(drawn)} are drawn here: the best of each method, then the best of all."


def _list_undrawn_runs(points: Sequence[ChartRow], groups: Sequence[RunGroup]) -> list[str]:
    """What has no place in a trade-off, and why."""
    left = []
    for point, one in zip(points, groups, strict=True):
        if point["quality"] is None:
            ends = dict.fromkeys(format_outcome(run) for run in one.runs if run.outcome.kind != "ok")
            left.append(f"{one.label} ({', '.join(ends) or 'no quality is known'})")
        elif not point["baseline"] and all(point[cost.field] is None for cost in charts.COST_AXES):
            left.append(f"{one.label} (no cost is known)")
    return [*left[:MAX_DRAWN_RUNS], *([f"and {len(left) - MAX_DRAWN_RUNS} more"] if len(left) > MAX_DRAWN_RUNS else [])]


def _build_comparison_row(comparison: PairComparison) -> ComparisonRow:
    digits = comparison.metric.decimals + 1
    low, high = round_outward(comparison.interval, digits)
    difference = format_decimal(comparison.mean_difference, max(digits, decimal_places(low)))
    return ComparisonRow(
        comparison.first.label, comparison.second.label, difference, f"{low} to {high}", comparison.verdict
    )


def _build_table_row(record: RunRecord, columns: Sequence[Column]) -> TableRow:
    name, *figures = (TableCell(column.format_text(record), _sort_value(column, record)) for column in columns)
    # An interval goes below its mean, which keeps the table narrow.
    return TableRow(
        record.outcome.kind, [name, *(TableCell(one.text.replace(" (", "\n("), one.sort_value) for one in figures)]
    )


def _sort_value(column: Column, record: RunRecord) -> CellValue:
    return finite_or_none(next(iter(column.raw_values(record).values())))


def _trade_off_charts(
    points: Sequence[ChartRow], color_groups: ColorGroups, run_groups: Sequence[RunGroup], *, uses_rouge: bool
) -> list[Chart]:
    alike = _has_comparable_costs(run_groups)
    title = "ROUGE-L" if uses_rouge else "held-out loss, nats"
    drawn = [
        charts.trade_off(points, color_groups, cost, title, higher_is_better=uses_rouge, comparable=alike)
        for cost in charts.COST_AXES
    ]
    return [drawing for drawing in drawn if drawing is not None]


def _has_comparable_costs(groups: Sequence[RunGroup]) -> bool:
    """Whether the costs of all that was trained compare."""
    trained = [one for one in groups if one.is_trained]
    return all(why_not_comparable(one, trained[0]) is None for one in trained)


def _memory_chart(records: Sequence[RunRecord]) -> Chart | None:
    lines, far = memory_chart.memory_limit_rows(records)
    return charts.memory_bars(
        memory_chart.memory_bar_rows(records), lines, memory_chart.memory_caption(records, lines, far)
    )


def _collect_examples(records: Sequence[RunRecord]) -> list[ExampleSummaries]:
    """The examples whose summaries were kept, with those of every run; nothing is mixed that has another article."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in records:
        for sample in record.quality.samples if record.quality else ():
            found.setdefault(sample_key(sample), {})[run_label(record)] = sample.generated
    return [ExampleSummaries(*key, generated) for key, generated in found.items()]
