"""What the page says, section by section, before it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peftbench.record import RunRecord, Sample
from peftbench.report.tables.columns import Column, CellValue, finite_or_none, run_label, format_outcome
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.analysis.costs import why_not_comparable
from peftbench.report.analysis.significance import ComparisonSet, PairComparison, compare_groups
from peftbench.report.digits import round_outward, decimal_places, format_decimal
from peftbench.report.settings import Setting, reproduce_commands, recipe_settings, environment_settings
from peftbench.report.text.formatting import method_kind
from peftbench.report.page import charts, memory_chart, series
from peftbench.report.page.charts import Chart
from peftbench.report.page.series import ColorGroups, ChartRow
from peftbench.report.tables.table import collect_notes, sort_records, visible_columns

MAX_DRAWN_RUNS = 24
"""Runs whose curves, bars and summaries are drawn, at most; all are in the table, the trade-offs and the data."""

MAX_NOTES = 60
"""Notes that are shown, at most."""


@dataclass(frozen=True)
class TableCell:
    """What a person reads, and what a column is sorted by."""

    text: str
    value: CellValue


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
    said: str


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
    lines: list[TableRow]
    trade_offs: list[Chart]
    memory: Chart | None
    losses: list[Chart]
    speed: Chart | None
    examples: list[ExampleSummaries]
    equal: list[Setting]
    unequal: list[Setting]
    notes: list[str]
    surroundings: list[Setting]
    repeats: dict[str, list[str]]
    drawn: str
    """Which runs the charts show, where it is not all."""
    front: bool
    """Whether a Pareto front is drawn."""
    by_rouge: bool
    """Whether quality is ROUGE-L, or the held-out loss."""
    undrawn: list[str]
    """Runs without a quality, and why, which a trade-off cannot show."""
    unfinished: list[UnfinishedRun]
    pairs: list[ComparisonRow]
    figure: str
    """What the pairs are compared by."""

    points: ClassVar[int] = series.MAX_CURVE_POINTS
    smoothed: ClassVar[int] = 2 * charts.SMOOTHING_RADIUS + 1

    @property
    def better(self) -> str:
        """Where in a trade-off the good runs lie."""
        return "Further up and further left is better" + ("." if self.by_rouge else ": a loss falls upwards.")

    @property
    def drawings(self) -> list[Chart]:
        """Every chart, in the page's order."""
        found = [*self.trade_offs, self.memory, *self.losses, self.speed]
        return [drawing for drawing in found if drawing is not None]


def build_page_data(
    records: Mapping[Path, RunRecord],
    title: str,
    summary: Sequence[str],
    *,
    compared: ComparisonSet | None = None,
    told: Sequence[str] | None = None,
    unfinished: Sequence[UnfinishedRun] = (),
) -> PageData:
    """What the page says of ``records``, by the paths of their files.

    ``compared`` is what ``differences`` made of them, and ``told`` their notes, where these were made already.
    """
    rows = sort_records(list(records.values()))
    columns, drawn = visible_columns(rows), select_drawn_runs(rows)
    compared = compared or compare_groups(rows)
    place = {id(record): number for number, record in enumerate(rows)}
    groups = ColorGroups.of(sorted(compared.every, key=lambda one: place[id(one.runs[0])]))
    by_rouge = compared.figure is not None and compared.figure.key == "rougeL"
    points = series.trade_off_rows(compared.every, groups, rouge=by_rouge)
    all_knobs, told = recipe_settings(rows), collect_notes(rows) if told is None else told
    found_at = {id(record): path for path, record in records.items()}
    return PageData(
        title=title,
        summary=list(summary),
        columns=columns,
        lines=[_build_table_row(record, columns) for record in rows],
        trade_offs=_trade_off_charts(points, groups, compared.every, rouge=by_rouge),
        memory=_memory_chart(_add_oom_runs(drawn, rows)),
        losses=charts.loss_curves(series.loss_curve_rows(drawn, groups), groups),
        speed=charts.throughput_chart(series.throughput_rows(drawn, groups), groups),
        examples=_collect_examples(drawn),
        equal=[knob for knob in all_knobs if knob.equal],
        unequal=[knob for knob in all_knobs if not knob.equal],
        notes=[*told[:MAX_NOTES], *([f"and {len(told) - MAX_NOTES} more, in the data"] if len(told) > MAX_NOTES else [])],
        surroundings=environment_settings(rows),
        repeats={run_label(record): reproduce_commands(record, found_at[id(record)]) for record in rows},
        drawn=_drawn_runs_note(drawn, rows),
        front=_has_comparable_costs(compared.every),
        by_rouge=by_rouge,
        undrawn=_list_undrawn_runs(points, compared.every),
        unfinished=list(unfinished),
        pairs=[_build_comparison_row(one) for one in compared.differences],
        figure=compared.figure.name if compared.figure else "",
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


def _list_undrawn_runs(points: Sequence[ChartRow], every: Sequence[RunGroup]) -> list[str]:
    """What has no place in a trade-off, and why."""
    left = []
    for point, one in zip(points, every, strict=True):
        if point["quality"] is None:
            ends = dict.fromkeys(format_outcome(run) for run in one.runs if run.outcome.kind != "ok")
            left.append(f"{one.label} ({', '.join(ends) or 'no quality is known'})")
        elif not point["baseline"] and all(point[cost.field] is None for cost in charts.COST_AXES):
            left.append(f"{one.label} (no cost is known)")
    return [*left[:MAX_DRAWN_RUNS], *([f"and {len(left) - MAX_DRAWN_RUNS} more"] if len(left) > MAX_DRAWN_RUNS else [])]


def _build_comparison_row(one: PairComparison) -> ComparisonRow:
    digits = one.figure.digits + 1
    low, high = round_outward(one.interval, digits)
    difference = format_decimal(one.mean, max(digits, decimal_places(low)))
    return ComparisonRow(one.first.label, one.second.label, difference, f"{low} to {high}", one.verdict)


def _build_table_row(record: RunRecord, columns: Sequence[Column]) -> TableRow:
    name, *figures = (TableCell(column.text(record), _sort_value(column, record)) for column in columns)
    # An interval goes below its mean, which keeps the table narrow.
    return TableRow(record.outcome.kind, [name, *(TableCell(one.text.replace(" (", "\n("), one.value) for one in figures)])


def _sort_value(column: Column, record: RunRecord) -> CellValue:
    return finite_or_none(next(iter(column.raw(record).values())))


def _trade_off_charts(points: Sequence[ChartRow], groups: ColorGroups, every: Sequence[RunGroup], *, rouge: bool) -> list[Chart]:
    alike = _has_comparable_costs(every)
    title = "ROUGE-L" if rouge else "held-out loss, nats"
    drawn = [
        charts.trade_off(points, groups, cost, title, more_is_better=rouge, alike=alike) for cost in charts.COST_AXES
    ]  # fmt: skip
    return [drawing for drawing in drawn if drawing is not None]


def _has_comparable_costs(every: Sequence[RunGroup]) -> bool:
    """Whether the costs of all that was trained compare."""
    trained = [one for one in every if one.trains]
    return all(why_not_comparable(one, trained[0]) is None for one in trained)


def _memory_chart(records: Sequence[RunRecord]) -> Chart | None:
    lines, far = memory_chart.memory_limit_rows(records)
    return charts.memory_bars(memory_chart.memory_bar_rows(records), lines, memory_chart.memory_caption(records, lines, far))


def _collect_examples(records: Sequence[RunRecord]) -> list[ExampleSummaries]:
    """The examples whose summaries were kept, with those of every run; nothing is mixed that has another article."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in records:
        for sample in record.quality.samples if record.quality else ():
            found.setdefault(_sample_key(sample), {})[run_label(record)] = sample.generated
    return [ExampleSummaries(*key, generated) for key, generated in found.items()]


def _sample_key(sample: Sample) -> tuple[str, str, str]:
    return sample.id, sample.article, sample.reference
