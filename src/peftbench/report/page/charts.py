"""The charts, in Vega-Lite by way of Altair. Colours are the page's own variables, so that they follow its theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from peftbench.report.page.memory_chart import CATEGORY_LABELS
from peftbench.report.page.series import NUM_COLORS, X_AXES, ChartRow, ColorGroups, pareto_front
from peftbench.report.text.formatting import finite_or_none

NUM_CATEGORY_COLORS = 14
"""Variables --m0 to --m13 of the style; those of groups are --k0 to --k7."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
LABEL_POSITIONS: dict[str, tuple[Literal["left", "right"], int, int]] = {
    "right above": ("left", 9, -7),
    "right below": ("left", 9, 13),
    "left above": ("right", -9, -7),
    "left below": ("right", -9, 13),
}
"""Where a point's name may stand: how its text is aligned, and how far off, in pixels."""
MAX_TABLE_ROWS = 200
"""Rows that a chart's table has, at most."""
SMOOTHING_RADIUS = 6
"""Points to either side that a smoothed curve is the mean of."""
MAX_LABELLED_POINTS = 12
"""Points that have their name beside them, at most; with more of them names would cover each other."""


_LEGEND = alt.Legend(symbolOpacity=1, symbolStrokeWidth=2)  # whatever a layer's own


@dataclass(frozen=True)
class CostAxis:
    """What a quality is drawn against."""

    field: str
    title: str


COST_AXES = (
    CostAxis("MiB", "peak memory (MiB)"),
    CostAxis("seconds", "train time (s)"),
    CostAxis("TFLOPs", "model TFLOPs"),
)


@dataclass(frozen=True)
class Chart:
    """A chart, what stands under it, and what a screen reader says of it."""

    name: str
    title: str
    caption: str
    spec: dict[str, Any]
    table_headers: list[str]
    table_rows: list[list[str]]
    """What it shows as a table, for those who do not see it; empty where that would be a page of its own."""


def _format_cell(value: str | float | None) -> str:
    return "unknown" if value is None else value if isinstance(value, str) else _format_number(value)


def _format_number(value: float) -> str:
    """Four digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _build_chart(
    name: str,
    title: str,
    caption: str,
    chart: alt.LayerChart | alt.FacetChart,
    *,
    data: Mapping[str, Sequence[ChartRow]],
    fields: Sequence[str] = (),
    table_source: Sequence[ChartRow] | None = None,
) -> Chart:
    """``data`` are the rows by the names that the chart's layers call them; Altair checks the chart without them.

    The rows that most are named after, "runs", are shown as a table too, with those ``fields``; or those ``told``.
    """
    described = chart.properties(
        width="container",
        description=f"{title}. {caption}",
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    ).configure(**_theme())
    rows = {named: [_drop_non_finite(row) for row in values] for named, values in data.items()}
    cells = [
        [_format_cell(row.get(field)) for field in fields]
        for row in (data["runs"] if table_source is None else table_source)
    ]
    shown = cells if fields and len(cells) <= MAX_TABLE_ROWS else []
    return Chart(name, title, caption, described.to_dict() | {"datasets": rows}, list(fields), shown)


def _drop_non_finite(row: ChartRow) -> ChartRow:
    """A row without floats that are no numbers: JSON knows none, and one of them would take the whole page away."""
    return {key: finite_or_none(value) if isinstance(value, float) else value for key, value in row.items()}


def _layer(dataset: str) -> alt.Chart:
    """A layer of the rows of that name."""
    return alt.Chart(alt.NamedData(name=dataset))


def _theme() -> dict[str, Any]:
    ink, faint = "var(--ink)", "var(--line)"
    words = {
        "labelColor": ink,
        "titleColor": ink,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    }
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": "transparent"},
        "axis": {**words, "gridColor": faint, "domainColor": ink, "tickColor": ink},
        "legend": {**words, "orient": "bottom", "columns": 3, "labelLimit": 260, "symbolSize": 90},
        "text": {"color": ink},
        "rule": {"color": ink},
    }


def _color_encoding(groups: ColorGroups, rows: Sequence[ChartRow], *, legend: bool = True) -> alt.Color:
    """A colour for each of the groups, the same in every chart, and a legend of those that ``rows`` are of."""
    there = _present_groups(groups, rows)
    scale = alt.Scale(domain=there, range=[f"var(--k{groups.names.index(name) % NUM_COLORS})" for name in there])
    return alt.Color("group:N", title=groups.title, scale=scale, legend=_LEGEND if legend else None)


def _shape_encoding(groups: ColorGroups, rows: Sequence[ChartRow]) -> alt.Shape:
    there = _present_groups(groups, rows)
    scale = alt.Scale(domain=there, range=[SHAPES[groups.names.index(name) % len(SHAPES)] for name in there])
    return alt.Shape("group:N", title=groups.title, scale=scale)


def _present_groups(groups: ColorGroups, rows: Sequence[ChartRow]) -> list[str]:
    return [name for name in groups.names if any(row["group"] == name for row in rows)]


def trade_off(
    points: Sequence[ChartRow],
    groups: ColorGroups,
    cost: CostAxis,
    title: str,
    *,
    higher_is_better: bool,
    comparable: bool,
) -> Chart | None:
    """Quality against a cost, with intervals, and the line of those that none beats; None where nothing is known.

    Baselines, which cost no training, are lines across. Of runs that are not ``alike`` in device, engine and length no
    front is drawn, for their costs do not compare.
    """
    judged = [point for point in points if point.get("quality") is not None]
    known = [point for point in judged if point.get(cost.field) is not None]
    if not known:
        return None
    best = pareto_front(known, cost.field, "quality", higher_is_better=higher_is_better) if comparable else []
    free = [point for point in judged if point["baseline"]]
    data = {
        "front": best,
        "runs": known,
        "intervals": [point for point in known if point.get("low") is not None],
        "across": free if len(free) <= MAX_LABELLED_POINTS else [],
        **_rows_by_label_position(known, cost),
    }
    layers = _trade_off_layers(cost, title, groups, judged, higher_is_better=higher_is_better)
    chart = alt.layer(*(layer for name, made in layers.items() if data[name] for layer in made)).properties(height=300)
    said = ", ".join(str(point["run"]) for point in best[:MAX_LABELLED_POINTS]) + (
        ", …" if len(best) > MAX_LABELLED_POINTS else ""
    )
    caption = (
        f"Pareto front of what was trained, by the means alone: {said}."
        if comparable
        else "These ran on several devices or engines, or for other steps: no Pareto front is drawn."
    )
    fields = ["run", cost.field, "quality", "low", "high", "seeds"]
    where = f"{title} against {cost.title}"
    return _build_chart(f"quality-{cost.field.lower()}", where, caption, chart, data=data, fields=fields)


def _rows_by_label_position(points: Sequence[ChartRow], cost: CostAxis) -> dict[str, list[ChartRow]]:
    """Points by the side that their names go to: within the chart, and a neighbour's not over one's own."""
    found: dict[str, list[ChartRow]] = {side: [] for side in LABEL_POSITIONS}
    if len(points) > MAX_LABELLED_POINTS:
        return found
    order = sorted(points, key=lambda point: float(point[cost.field] or 0))
    for index, point in enumerate(order):
        across = "left" if index and index == len(order) - 1 else "right"
        found[f"{across} {'below' if index % 2 else 'above'}"].append(point)
    return found


def _trade_off_layers(
    cost: CostAxis, title: str, groups: ColorGroups, rows: Sequence[ChartRow], *, higher_is_better: bool
) -> dict[str, list[alt.Chart]]:
    """By the name of the rows that each draws; those without rows must be left out, or Vega warns of them."""
    x = alt.X(f"{cost.field}:Q", title=cost.title, scale=alt.Scale(zero=False, padding=24))
    scale = alt.Scale(zero=False, reverse=not higher_is_better)
    y, low = alt.Y("quality:Q", title=title, scale=scale), alt.Y("low:Q", title=title, scale=scale)
    colour, shape = _color_encoding(groups, rows), _shape_encoding(groups, rows)
    figures = (cost.field, "quality", "low", "high", "seeds")
    tips = [alt.Tooltip("run:N"), *(alt.Tooltip(f"{name}:Q", format=",.4~r") for name in figures)]
    line = _layer("front").mark_line(interpolate="step-after", color="var(--front)", strokeDash=[5, 4], strokeWidth=1.5)
    return {
        "front": [line.encode(x=x, y=y)],
        "intervals": [_layer("intervals").mark_rule(strokeWidth=1.5).encode(x=x, y=low, y2="high:Q", color=colour)],
        "runs": [
            _layer("runs")
            .mark_point(filled=True, size=110, opacity=1)
            .encode(x=x, y=y, color=colour, shape=shape, tooltip=tips)
        ],
        "across": [
            _layer("across")
            .mark_rule(strokeDash=[2, 3], strokeWidth=1.3)
            .encode(y=y, color=colour, tooltip=[tips[0], tips[2]]),
            _layer("across")
            .mark_text(align="left", dx=3, dy=-7, fontSize=11)
            .encode(x=alt.value(0), y=y, text="run:N"),
        ],
        **{
            side: [_layer(side).mark_text(align=align, dx=dx, dy=dy, fontSize=11).encode(x=x, y=y, text="run:N")]
            for side, (align, dx, dy) in LABEL_POSITIONS.items()
        },
    }


def memory_bars(rows: Sequence[ChartRow], limit_rows: Sequence[ChartRow], caption: str) -> Chart | None:
    """Where the peak of each run went, stacked, and its budget."""
    if not rows:
        return None
    runs = list(dict.fromkeys(str(row["run"]) for row in rows))
    categories = [category for category in CATEGORY_LABELS.values() if any(row["category"] == category for row in rows)]
    colours = [
        f"var(--m{list(CATEGORY_LABELS.values()).index(category) % NUM_CATEGORY_COLORS})" for category in categories
    ]
    y = alt.Y("run:N", title=None, sort=runs, axis=alt.Axis(labelLimit=220))
    bars = (
        _layer("runs")
        .mark_bar(stroke="var(--paper)", strokeWidth=1)
        .encode(
            x=alt.X("MiB:Q", title="MiB", stack="zero"),
            y=y,
            order=alt.Order("order:Q"),
            color=alt.Color(
                "category:N", title=None, sort=categories, scale=alt.Scale(domain=categories, range=colours)
            ),
            tooltip=[alt.Tooltip("run:N"), alt.Tooltip("category:N"), alt.Tooltip("MiB:Q", format=",.1f")],
        )
    )
    layers = [bars]
    if limit_rows:
        mark = _layer("budgets").mark_tick(color="var(--ink)", thickness=4, bandSize=34)
        tips = [alt.Tooltip("run:N"), alt.Tooltip("what:N"), alt.Tooltip("limit:Q", title="MiB", format=",.0f")]
        layers.append(mark.encode(x="limit:Q", y=y, tooltip=tips))
    return _build_chart(
        "memory",
        "Where the memory goes",
        caption,
        alt.layer(*layers).properties(height=34 * len(runs)),
        data={"runs": rows, "budgets": limit_rows},
        fields=["run", "category", "MiB"],
    )


def _curve_samples(rows: Sequence[ChartRow]) -> list[ChartRow]:
    """The first, the middle and the last point of each run's curve."""
    runs: dict[object, list[ChartRow]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    places = [(points, sorted({0, len(points) // 2, len(points) - 1})) for points in runs.values()]
    return [points[place] for points, chosen in places for place in chosen]


def loss_curves(rows: Sequence[ChartRow], groups: ColorGroups) -> list[Chart]:
    """The training loss over each of what is known of all."""
    drawn = []
    for over, words in X_AXES.items():
        known = [row for row in rows if over in row]
        if not known:
            continue
        colour = _color_encoding(groups, known)
        dash = alt.StrokeDash("group:N", legend=None)
        x = alt.X(f"{over}:Q", title=words)
        scale = alt.Scale(zero=False)
        base = _layer("runs").transform_window(
            smooth="mean(loss)",
            frame=[-SMOOTHING_RADIUS, SMOOTHING_RADIUS],
            groupby=["run"],
            sort=[alt.SortField(over)],
        )
        tips = [alt.Tooltip("run:N"), alt.Tooltip(f"{over}:Q", format=",.0f"), alt.Tooltip("loss:Q", format=".3f")]
        chart = alt.layer(
            base.mark_line(strokeWidth=1, opacity=0.22).encode(
                x=x, y=alt.Y("loss:Q", title="training loss, nats", scale=scale), color=colour, detail="run:N"
            ),
            base.mark_line(strokeWidth=1.9).encode(
                x=x,
                y=alt.Y("smooth:Q", title="training loss, nats", scale=scale),
                color=colour,
                detail="run:N",
                strokeDash=dash,
                tooltip=tips,
            ),
        ).properties(height=260)
        left_out = len({row["run"] for row in rows} - {row["run"] for row in known})
        caption = f"Over {words}." + (
            f" Not drawn, for their records do not say it: {left_out} of the runs." if left_out else ""
        )
        drawn.append(
            _build_chart(
                f"loss-{over}",
                f"Training loss by {over}",
                caption,
                chart,
                data={"runs": known},
                fields=["run", over, "loss"],
                table_source=_curve_samples(known),
            )
        )
    return drawn


def throughput_chart(rows: Sequence[ChartRow], groups: ColorGroups) -> Chart | None:
    """Real tokens a second, with the spread of the steps."""
    if not rows:
        return None
    runs = list(dict.fromkeys(str(row["run"]) for row in rows))
    y = alt.Y("run:N", title=None, sort=runs, axis=alt.Axis(labelLimit=220, grid=True))
    base = _layer("runs")
    colour = _color_encoding(groups, rows, legend=False)
    tips = [
        alt.Tooltip("run:N"),
        *(alt.Tooltip(f"{name}:Q", format=",.0f") for name in ("tokens_per_second", "p10", "p90")),
    ]
    title = "real tokens a second"
    chart = alt.layer(
        base.mark_rule(strokeWidth=6, opacity=0.45).encode(
            x=alt.X("p10:Q", title=title), x2="p90:Q", y=y, color=colour, tooltip=tips
        ),
        base.mark_point(filled=True, size=90, opacity=1).encode(
            x=alt.X("tokens_per_second:Q", title=title), y=y, color=colour, tooltip=tips
        ),
    ).properties(height=28 * len(runs))
    caption = (
        "The point is the mean over all timed seconds, the table's figure; the bar reaches from the tenth to the "
        "ninetieth percentile of the timed steps. A mean lies outside where a few steps were very slow or fast, or "
        "where time went to making batches."
    )
    return _build_chart(
        "speed",
        "Throughput and its spread",
        caption,
        chart,
        data={"runs": rows},
        fields=["run", "tokens_per_second", "p10", "p90"],
    )


def chart_specs(charts: Sequence[Chart]) -> Mapping[str, dict[str, Any]]:
    """Specifications by the names of the figures they go to."""
    return {drawing.name: drawing.spec for drawing in charts}
