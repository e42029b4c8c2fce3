"""Data of the page, section by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peftbench.record import RunRecord
from peftbench.record.quality import MAX_SAMPLE_CHARS
from peftbench.record.sanity_checks import RSS_SLACK_BYTES
from peftbench.report.analysis.comparability import why_not_comparable
from peftbench.report.analysis.examples import describe_overlap
from peftbench.report.analysis.quality_metrics import HELD_OUT_LOSS, QualityMetric, get_headline_metric
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.analysis.significance import ComparisonSet, PairComparison, compare_groups
from peftbench.report.page import charts, memory_chart, series
from peftbench.report.page.charts import Chart
from peftbench.report.page.series import ChartRow, ColorGroups
from peftbench.report.recommendation import describe_context
from peftbench.report.reproduce import reproduce_commands
from peftbench.report.runs import method_kind, run_label, sample_key, sort_records
from peftbench.report.settings import Setting, environment_settings, recipe_settings
from peftbench.report.tables.columns import Column, format_outcome
from peftbench.report.tables.table import collect_notes, group_notes, visible_columns
from peftbench.report.text.formatting import CellValue, decimal_places, finite_or_none, format_decimal, round_outward

MAX_DRAWN_RUNS = 24
"""Maximum number of runs with curves, bars and texts; the table, trade-offs and downloads have all runs."""

MAX_NOTES = 60
"""Maximum number of shown notes."""


@dataclass(frozen=True)
class TableCell:
    """Text and sort value of a table cell."""

    text: str
    sort_value: CellValue


@dataclass(frozen=True)
class TableRow:
    """Table row of a run."""

    outcome: str
    cells: list[TableCell]


@dataclass(frozen=True)
class ExampleTexts:
    """One example with the text that each run generated."""

    id: str
    prompt: str
    reference: str
    generated: dict[str, str]

    @property
    def is_cut(self) -> bool:
        """True if the record may have only the beginning of the prompt."""
        return len(self.prompt) >= MAX_SAMPLE_CHARS


@dataclass(frozen=True)
class UnfinishedRun:
    """A run without a result."""

    name: str
    state: str
    detail: str

    @property
    def sentence(self) -> str:
        """Name, state and, if known, the reason."""
        return f"{self.name} ({self.state})" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class ComparisonRow:
    """Table row of a comparison of two configurations."""

    first: str
    second: str
    difference: str
    interval: str
    verdict: str


@dataclass(frozen=True)
class PageData:
    """All data of the page."""

    title: str
    context: str
    """Model, data, device, budget and dates of the runs; empty without runs."""
    warnings: list[str]
    """Sentences on evaluated examples that are training examples."""
    recommendation: list[str]
    """Recommended configuration and the reasons, as sentences; empty if no two configurations are compared."""
    summary: list[str]
    columns: list[Column]
    rows: list[TableRow]
    trade_off_charts: list[Chart]
    memory_chart: Chart | None
    loss_charts: list[Chart]
    throughput_chart: Chart | None
    examples: list[ExampleTexts]
    equal_settings: list[Setting]
    differing_settings: list[Setting]
    notes: list[str]
    environment: list[Setting]
    reproduce_commands: dict[str, list[str]]
    drawn_runs_note: str
    """Note that names the runs in the charts; empty if they show all."""
    has_pareto_front: bool
    """True if a Pareto front is drawn."""
    undrawn_runs: list[str]
    """Runs that the trade-off charts cannot show, with the reason."""
    unfinished_runs: list[UnfinishedRun]
    comparisons: list[ComparisonRow]
    metric: QualityMetric
    """Metric of the comparisons and of the trade-off charts."""

    memory_tolerance_mib: ClassVar[int] = RSS_SLACK_BYTES // 2**20
    max_curve_points: ClassVar[int] = series.MAX_CURVE_POINTS
    smoothing_window: ClassVar[int] = 2 * charts.SMOOTHING_RADIUS + 1

    @property
    def better_direction(self) -> str:
        """Sentence on the direction of better runs in a trade-off chart."""
        axis = "" if self.metric.higher_is_better else f" (the {self.metric.name} axis is inverted)"
        return f"Up and to the left is better{axis}."

    @property
    def all_charts(self) -> list[Chart]:
        """All charts, in page order."""
        charts_or_none = [*self.trade_off_charts, self.memory_chart, *self.loss_charts, self.throughput_chart]
        return [chart for chart in charts_or_none if chart is not None]


def build_page_data(
    records: Mapping[Path, RunRecord],
    title: str,
    summary: Sequence[str],
    *,
    recommendation: Sequence[str] = (),
    comparison_set: ComparisonSet | None = None,
    note_lines: Sequence[str] | None = None,
    unfinished_runs: Sequence[UnfinishedRun] = (),
) -> PageData:
    """Build the page data of ``records``, keyed by the paths of their files.

    ``comparison_set`` and ``note_lines`` are used if already computed.
    """
    rows = sort_records(list(records.values()))
    columns, drawn = visible_columns(rows), select_drawn_runs(rows)
    comparison_set = comparison_set or compare_groups(rows)
    position = {id(record): index for index, record in enumerate(rows)}
    groups = ColorGroups.from_run_groups(sorted(comparison_set.groups, key=lambda g: position[id(g.runs[0])]))
    metric = comparison_set.metric or HELD_OUT_LOSS
    points = series.trade_off_rows(comparison_set.groups, groups, metric)
    settings, note_lines = recipe_settings(rows), collect_notes(rows) if note_lines is None else note_lines
    paths = {id(record): path for path, record in records.items()}
    return PageData(
        title=title,
        context=describe_context(rows) if rows else "",
        warnings=group_notes(rows, describe_overlap),
        recommendation=list(recommendation),
        summary=list(summary),
        columns=columns,
        rows=[_build_table_row(record, columns) for record in rows],
        trade_off_charts=_trade_off_charts(points, groups, comparison_set.groups, metric),
        memory_chart=_memory_chart(_add_oom_runs(drawn, rows)),
        loss_charts=[
            *charts.loss_curves(series.loss_curve_rows(drawn, groups), groups),
            *charts.held_out_curves(series.held_out_curve_rows(drawn, groups), groups),
        ],
        throughput_chart=charts.throughput_chart(series.throughput_rows(drawn, groups), groups),
        examples=_collect_examples(drawn),
        equal_settings=[setting for setting in settings if setting.is_constant],
        differing_settings=[setting for setting in settings if not setting.is_constant],
        notes=[
            *note_lines[:MAX_NOTES],
            *([f"and {len(note_lines) - MAX_NOTES} more in the downloads"] if len(note_lines) > MAX_NOTES else []),
        ],
        environment=environment_settings(rows),
        reproduce_commands={run_label(record): reproduce_commands(record, paths[id(record)]) for record in rows},
        drawn_runs_note=_drawn_runs_note(drawn, rows),
        has_pareto_front=_has_comparable_costs(comparison_set.groups),
        undrawn_runs=_list_undrawn_runs(points, comparison_set.groups),
        unfinished_runs=list(unfinished_runs),
        comparisons=[_build_comparison_row(one) for one in comparison_set.pair_comparisons],
        metric=metric,
    )


def select_drawn_runs(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs to draw, in table order: all, or the best of each method and then the best overall."""
    if len(records) <= MAX_DRAWN_RUNS:
        return list(records)
    by_quality = sorted(records, key=_quality_rank)
    best_by_method = {method_kind(record): record for record in reversed(by_quality)}
    selected = list(dict.fromkeys(map(id, [*best_by_method.values(), *by_quality])))[:MAX_DRAWN_RUNS]
    return [record for record in records if id(record) in selected]


def _quality_rank(record: RunRecord) -> tuple[bool, bool, float, float]:
    """Return a sort key, best first: outcome ok, has a headline score, that score, held-out loss."""
    metric, loss = get_headline_metric(record), finite_or_none(HELD_OUT_LOSS.get_value(record))
    score = finite_or_none(metric.get_value(record)) if metric else None
    by_score = 0.0 if metric is None or score is None else -score if metric.higher_is_better else score
    return record.outcome.kind != "ok", score is None, by_score, float("inf") if loss is None else loss


def _add_oom_runs(drawn: Sequence[RunRecord], records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the drawn runs and those out of memory, for the memory chart."""
    drawn_ids = {id(record) for record in drawn}
    oom_runs = [record for record in records if record.outcome.kind == "oom" and id(record) not in drawn_ids]
    return [*drawn, *oom_runs[:MAX_DRAWN_RUNS]]


def _drawn_runs_note(drawn: Sequence[RunRecord], records: Sequence[RunRecord]) -> str:
    if len(drawn) == len(records):
        return ""
    return f"{len(drawn)} of {len(records):,} runs are shown: the best of each method, then the best overall."


def _list_undrawn_runs(points: Sequence[ChartRow], groups: Sequence[RunGroup]) -> list[str]:
    """Return the groups that the trade-off charts cannot show, with the reason."""
    undrawn = []
    for point, one in zip(points, groups, strict=True):
        if point["quality"] is None:
            outcomes = dict.fromkeys(format_outcome(run) for run in one.runs if run.outcome.kind != "ok")
            undrawn.append(f"{one.label} ({', '.join(outcomes) or 'quality unknown'})")
        elif not point["baseline"] and all(point[cost.field] is None for cost in charts.COST_AXES):
            undrawn.append(f"{one.label} (costs unknown)")
    num_hidden = len(undrawn) - MAX_DRAWN_RUNS
    return [*undrawn[:MAX_DRAWN_RUNS], *([f"and {num_hidden} more"] if num_hidden > 0 else [])]


def _build_comparison_row(comparison: PairComparison) -> ComparisonRow:
    digits = comparison.metric.decimals + 1
    low, high = round_outward(comparison.interval, digits)
    difference = format_decimal(comparison.mean_difference, max(digits, decimal_places(low)))
    return ComparisonRow(
        comparison.first.label, comparison.second.label, difference, f"{low} to {high}", comparison.verdict
    )


def _build_table_row(record: RunRecord, columns: Sequence[Column]) -> TableRow:
    name, *values = (TableCell(column.format_text(record), _sort_value(column, record)) for column in columns)
    # Intervals on a second line keep the table narrow.
    return TableRow(
        record.outcome.kind, [name, *(TableCell(cell.text.replace(" (", "\n("), cell.sort_value) for cell in values)]
    )


def _sort_value(column: Column, record: RunRecord) -> CellValue:
    return finite_or_none(next(iter(column.raw_values(record).values())))


def _trade_off_charts(
    points: Sequence[ChartRow], color_groups: ColorGroups, run_groups: Sequence[RunGroup], metric: QualityMetric
) -> list[Chart]:
    comparable = _has_comparable_costs(run_groups)
    title, better = metric.definition.axis_title, metric.higher_is_better
    drawn = [
        charts.trade_off(points, color_groups, cost, title, higher_is_better=better, comparable=comparable)
        for cost in charts.COST_AXES
    ]
    return [chart for chart in drawn if chart is not None]


def _has_comparable_costs(groups: Sequence[RunGroup]) -> bool:
    """True if the costs of all trained groups can be compared."""
    trained = [one for one in groups if one.is_trained]
    return all(why_not_comparable(one, trained[0]) is None for one in trained)


def _memory_chart(records: Sequence[RunRecord]) -> Chart | None:
    limits, far_limits_note = memory_chart.memory_limit_rows(records)
    caption = memory_chart.memory_caption(records, limits, far_limits_note)
    rows = memory_chart.memory_bar_rows(records)
    return charts.memory_bars(rows, limits, caption, memory_chart.memory_title(records))


def _collect_examples(records: Sequence[RunRecord]) -> list[ExampleTexts]:
    """Return the examples with saved texts, with the text of every run."""
    texts: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in records:
        for sample in record.quality.samples if record.quality else ():
            texts.setdefault(sample_key(sample), {})[run_label(record)] = sample.generated
    return [ExampleTexts(*key, generated) for key, generated in texts.items()]
