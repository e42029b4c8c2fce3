"""What the page says, section by section, before it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peftbench.record import RunRecord, Sample
from peftbench.report.columns import Column, Raw, finite, method_label, outcome_text
from peftbench.report.configurations import Configuration
from peftbench.report.costs import apart
from peftbench.report.differences import Compared, Difference, differences
from peftbench.report.digits import outward, places, rounded
from peftbench.report.knobs import Knob, commands, knobs, surroundings
from peftbench.report.lines import kind_of
from peftbench.report.page import charts, memory, series
from peftbench.report.page.charts import Drawing
from peftbench.report.page.series import Groups, Row
from peftbench.report.table import notes, ordered, shown

DRAWN = 24
"""Runs whose curves, bars and summaries are drawn, at most; all are in the table, the trade-offs and the data."""

TOLD = 60
"""Notes that are shown, at most."""


@dataclass(frozen=True)
class Cell:
    """What a person reads, and what a column is sorted by."""

    text: str
    value: Raw


@dataclass(frozen=True)
class Line:
    """A run's row of the table."""

    outcome: str
    cells: list[Cell]


@dataclass(frozen=True)
class Example:
    """One example, with what each run made of it."""

    id: str
    article: str
    reference: str
    generated: dict[str, str]


@dataclass(frozen=True)
class Unfinished:
    """A run that has no result yet."""

    name: str
    state: str
    said: str


@dataclass(frozen=True)
class Pair:
    """A comparison of two configurations."""

    first: str
    second: str
    difference: str
    interval: str
    verdict: str


@dataclass(frozen=True)
class Content:
    """All that the page shows."""

    title: str
    summary: list[str]
    columns: list[Column]
    lines: list[Line]
    trade_offs: list[Drawing]
    memory: Drawing | None
    losses: list[Drawing]
    speed: Drawing | None
    examples: list[Example]
    equal: list[Knob]
    unequal: list[Knob]
    notes: list[str]
    surroundings: list[Knob]
    repeats: dict[str, list[str]]
    drawn: str
    """Which runs the charts show, where it is not all."""
    front: bool
    """Whether a Pareto front is drawn."""
    by_rouge: bool
    """Whether quality is ROUGE-L, or the held-out loss."""
    undrawn: list[str]
    """Runs without a quality, and why, which a trade-off cannot show."""
    unfinished: list[Unfinished]
    pairs: list[Pair]
    figure: str
    """What the pairs are compared by."""

    points: ClassVar[int] = series.POINTS
    smoothed: ClassVar[int] = 2 * charts.SMOOTHED + 1

    @property
    def better(self) -> str:
        """Where in a trade-off the good runs lie."""
        return "Further up and further left is better" + ("." if self.by_rouge else ": a loss falls upwards.")

    @property
    def drawings(self) -> list[Drawing]:
        """Every chart, in the page's order."""
        found = [*self.trade_offs, self.memory, *self.losses, self.speed]
        return [drawing for drawing in found if drawing is not None]


def content(
    records: Mapping[Path, RunRecord],
    title: str,
    summary: Sequence[str],
    *,
    compared: Compared | None = None,
    told: Sequence[str] | None = None,
    unfinished: Sequence[Unfinished] = (),
) -> Content:
    """What the page says of ``records``, by the paths of their files.

    ``compared`` is what ``differences`` made of them, and ``told`` their notes, where these were made already.
    """
    rows = ordered(list(records.values()))
    columns, drawn = shown(rows), chosen(rows)
    compared = compared or differences(rows)
    place = {id(record): number for number, record in enumerate(rows)}
    groups = Groups.of(sorted(compared.every, key=lambda one: place[id(one.runs[0])]))
    by_rouge = compared.figure is not None and compared.figure.key == "rougeL"
    points = series.points(compared.every, groups, rouge=by_rouge)
    all_knobs, told = knobs(rows), notes(rows) if told is None else told
    found_at = {id(record): path for path, record in records.items()}
    return Content(
        title=title,
        summary=list(summary),
        columns=columns,
        lines=[_line(record, columns) for record in rows],
        trade_offs=_trade_offs(points, groups, compared.every, rouge=by_rouge),
        memory=_memory(_with_refused(drawn, rows)),
        losses=charts.loss_curves(series.curves(drawn, groups), groups),
        speed=charts.speeds(series.speed(drawn, groups), groups),
        examples=_examples(drawn),
        equal=[knob for knob in all_knobs if knob.equal],
        unequal=[knob for knob in all_knobs if not knob.equal],
        notes=[*told[:TOLD], *([f"and {len(told) - TOLD} more, in the data"] if len(told) > TOLD else [])],
        surroundings=surroundings(rows),
        repeats={method_label(record): commands(record, found_at[id(record)]) for record in rows},
        drawn=_said_of(drawn, rows),
        front=_alike(compared.every),
        by_rouge=by_rouge,
        undrawn=_undrawn(points, compared.every),
        unfinished=list(unfinished),
        pairs=[_pair(one) for one in compared.differences],
        figure=compared.figure.name if compared.figure else "",
    )


def chosen(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs that are drawn: all, or the best of each method and then the best of all, in the table's order."""
    if len(records) <= DRAWN:
        return list(records)
    by_quality = sorted(records, key=_rank)
    first = {kind_of(record): record for record in reversed(by_quality)}
    taken = list(dict.fromkeys(map(id, [*first.values(), *by_quality])))[:DRAWN]
    return [record for record in records if id(record) in taken]


def _rank(record: RunRecord) -> tuple[bool, bool, float, float]:
    """Smaller is better: ended well, with ROUGE-L, by that, then by held-out loss."""
    score, loss = series.rouge_l(record), finite(record.quality.loss if record.quality else None)
    by_score = -(score.mean if score else 0.0)
    return record.outcome.kind != "ok", score is None, by_score, float("inf") if loss is None else loss


def _with_refused(drawn: Sequence[RunRecord], records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those that are drawn, and what did not fit, which a chart of memory is for."""
    there = {id(record) for record in drawn}
    refused = [record for record in records if record.outcome.kind == "oom" and id(record) not in there]
    return [*drawn, *refused[:DRAWN]]


def _said_of(drawn: Sequence[RunRecord], records: Sequence[RunRecord]) -> str:
    if len(drawn) == len(records):
        return ""
    return f"Of {len(records):,} runs {len(drawn)} are drawn here: the best of each method, then the best of all."


def _undrawn(points: Sequence[Row], every: Sequence[Configuration]) -> list[str]:
    """What has no place in a trade-off, and why."""
    left = []
    for point, one in zip(points, every, strict=True):
        if point["quality"] is None:
            ends = dict.fromkeys(outcome_text(run) for run in one.runs if run.outcome.kind != "ok")
            left.append(f"{one.label} ({', '.join(ends) or 'no quality is known'})")
        elif not point["baseline"] and all(point[cost.field] is None for cost in charts.COSTS):
            left.append(f"{one.label} (no cost is known)")
    return [*left[:DRAWN], *([f"and {len(left) - DRAWN} more"] if len(left) > DRAWN else [])]


def _pair(one: Difference) -> Pair:
    digits = one.figure.digits + 1
    low, high = outward(one.interval, digits)
    difference = rounded(one.mean, max(digits, places(low)))
    return Pair(one.first.label, one.second.label, difference, f"{low} to {high}", one.verdict)


def _line(record: RunRecord, columns: Sequence[Column]) -> Line:
    name, *figures = (Cell(column.text(record), _first(column, record)) for column in columns)
    # An interval goes below its mean, which keeps the table narrow.
    return Line(record.outcome.kind, [name, *(Cell(one.text.replace(" (", "\n("), one.value) for one in figures)])


def _first(column: Column, record: RunRecord) -> Raw:
    return finite(next(iter(column.raw(record).values())))


def _trade_offs(points: Sequence[Row], groups: Groups, every: Sequence[Configuration], *, rouge: bool) -> list[Drawing]:
    alike = _alike(every)
    title = "ROUGE-L" if rouge else "held-out loss, nats"
    drawn = [
        charts.trade_off(points, groups, cost, title, more_is_better=rouge, alike=alike) for cost in charts.COSTS
    ]  # fmt: skip
    return [drawing for drawing in drawn if drawing is not None]


def _alike(every: Sequence[Configuration]) -> bool:
    """Whether the costs of all that was trained compare."""
    trained = [one for one in every if one.trains]
    return all(apart(one, trained[0]) is None for one in trained)


def _memory(records: Sequence[RunRecord]) -> Drawing | None:
    lines, far = memory.lines(records)
    return charts.memory_bars(memory.bars(records), lines, memory.caption(records, lines, far))


def _examples(records: Sequence[RunRecord]) -> list[Example]:
    """The examples whose summaries were kept, with those of every run; nothing is mixed that has another article."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in records:
        for sample in record.quality.samples if record.quality else ():
            found.setdefault(_key(sample), {})[method_label(record)] = sample.generated
    return [Example(*key, generated) for key, generated in found.items()]


def _key(sample: Sample) -> tuple[str, str, str]:
    return sample.id, sample.article, sample.reference
