"""Charts as Vega-Lite specifications, from Altair. Colors are CSS variables, so they follow the page's theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from peftbench.report.page.label_placement import FONT_SIZE, LABEL_POSITIONS, LabeledPoint, place_labels
from peftbench.report.page.series import NUM_COLORS, X_AXES, ChartRow, ColorGroups, pareto_front
from peftbench.report.text.formatting import finite_or_none
from peftbench.report.text.memory_categories import MEMORY_CATEGORY_LABELS

NUM_CATEGORY_COLORS = 15
"""CSS variables --m0 to --m14 for memory categories; those of groups are --k0 to --k7."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
MAX_TABLE_ROWS = 200
"""Maximum number of rows of a chart's table."""
SMOOTHING_RADIUS = 6
"""Points on each side in the moving average of a curve."""
MAX_LABELED_POINTS = 12
"""Maximum number of labeled points; more labels would overlap."""


_LEGEND = alt.Legend(symbolOpacity=1, symbolStrokeWidth=2)  # independent of the layers' opacity


@dataclass(frozen=True)
class CostAxis:
    """A cost against which quality is drawn."""

    field: str
    title: str


COST_AXES = (
    CostAxis("MiB", "peak memory (MiB)"),
    CostAxis("seconds", "train time (s)"),
    CostAxis("TFLOPs", "model compute (TFLOP)"),
)


@dataclass(frozen=True)
class Chart:
    """A chart with its caption and its data table."""

    name: str
    title: str
    caption: str
    spec: dict[str, Any]
    table_headers: list[str]
    table_rows: list[list[str]]
    """Data as a table, for screen readers; empty if too long."""


def _format_cell(value: str | float | None) -> str:
    return "unknown" if value is None else value if isinstance(value, str) else _format_number(value)


def _format_number(value: float) -> str:
    """Format with four significant digits, and all digits before the decimal point."""
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
    """Build a chart from ``data``: rows by dataset name. Altair validates the chart without them.

    The dataset "runs" (or ``table_source``) is shown as a table of ``fields`` too.
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
    """Replace NaN and infinity with None: JSON cannot represent them, and one would break the whole page."""
    return {key: finite_or_none(value) if isinstance(value, float) else value for key, value in row.items()}


def _layer(dataset: str) -> alt.Chart:
    """Return a layer of a dataset."""
    return alt.Chart(alt.NamedData(name=dataset))


def _theme() -> dict[str, Any]:
    ink, faint = "var(--ink)", "var(--line)"
    labels = {
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
        "axis": {
            **labels,
            "gridColor": faint,
            "domainColor": ink,
            "tickColor": ink,
            "labelFlush": False,  # it moves the last label onto its neighbor
            "labelOverlap": "greedy",
            "labelSeparation": 8,
        },
        "legend": {**labels, "orient": "bottom", "columns": 2, "labelLimit": 260, "symbolSize": 90},
        "text": {"color": ink},
        "rule": {"color": ink},
    }


def _color_encoding(groups: ColorGroups, rows: Sequence[ChartRow], *, legend: bool = True) -> alt.Color:
    """Return a color for each group, the same in every chart, with a legend of the groups of ``rows``."""
    present = _present_groups(groups, rows)
    scale = alt.Scale(domain=present, range=[f"var(--k{groups.names.index(name) % NUM_COLORS})" for name in present])
    return alt.Color("group:N", title=groups.title, scale=scale, legend=_LEGEND if legend else None)


def _shape_encoding(groups: ColorGroups, rows: Sequence[ChartRow]) -> alt.Shape:
    present = _present_groups(groups, rows)
    scale = alt.Scale(domain=present, range=[SHAPES[groups.names.index(name) % len(SHAPES)] for name in present])
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
    """Return quality against a cost, with intervals and the Pareto front; None without data.

    Baselines are horizontal lines. Without ``comparable`` costs (device, engine, steps) no front is drawn.
    """
    evaluated = [point for point in points if point.get("quality") is not None]
    known = [point for point in evaluated if point.get(cost.field) is not None]
    if not known:
        return None
    front = pareto_front(known, cost.field, "quality", higher_is_better=higher_is_better) if comparable else []
    baselines = [point for point in evaluated if point["baseline"]]
    data = {
        "front": front,
        "runs": known,
        "intervals": [point for point in known if point.get("low") is not None],
        "baselines": baselines if len(baselines) <= MAX_LABELED_POINTS else [],
        **_rows_by_label_position(known, baselines, cost, higher_is_better=higher_is_better),
    }
    layers = _trade_off_layers(cost, title, groups, evaluated, higher_is_better=higher_is_better)
    chart = alt.layer(*(layer for name, named in layers.items() if data[name] for layer in named)).properties(
        height=300
    )
    names = ", ".join(str(point["run"]) for point in front[:MAX_LABELED_POINTS]) + (
        ", …" if len(front) > MAX_LABELED_POINTS else ""
    )
    caption = (
        f"Pareto front of the trained configurations, by means only: {names}."
        if comparable
        else "No Pareto front: devices, engines, steps or batches differ."
    )
    fields = ["run", cost.field, "quality", "low", "high", "seeds"]
    heading = f"{title} vs. {cost.title}"
    return _build_chart(f"quality-{cost.field.lower()}", heading, caption, chart, data=data, fields=fields)


def _rows_by_label_position(
    points: Sequence[ChartRow], baselines: Sequence[ChartRow], cost: CostAxis, *, higher_is_better: bool
) -> dict[str, list[ChartRow]]:
    """Return points by label position. The legend alone names points whose labels would overlap."""
    by_position: dict[str, list[ChartRow]] = {side: [] for side in LABEL_POSITIONS}
    if len(points) > MAX_LABELED_POINTS:
        return by_position
    labeled = [
        LabeledPoint(
            str(point["run"]),
            _to_float(point[cost.field]),
            _to_float(point["quality"]),
            None if point.get("low") is None else _to_float(point["low"]),
            None if point.get("high") is None else _to_float(point["high"]),
        )
        for point in points
    ]
    lines = [(str(point["run"]), _to_float(point["quality"])) for point in baselines]
    positions = place_labels(labeled, lines, is_y_reversed=not higher_is_better)
    for point, position in zip(points, positions, strict=True):
        if position is not None:
            by_position[position].append(point)
    return by_position


def _to_float(value: object) -> float:
    return float(str(value))


def _trade_off_layers(
    cost: CostAxis, title: str, groups: ColorGroups, rows: Sequence[ChartRow], *, higher_is_better: bool
) -> dict[str, list[alt.Chart]]:
    """Return layers by dataset name. Layers without rows must be omitted, because Vega warns about them."""
    x = alt.X(f"{cost.field}:Q", title=cost.title, scale=alt.Scale(zero=False, padding=24))
    scale = alt.Scale(zero=False, reverse=not higher_is_better)
    y, low = alt.Y("quality:Q", title=title, scale=scale), alt.Y("low:Q", title=title, scale=scale)
    color, shape = _color_encoding(groups, rows), _shape_encoding(groups, rows)
    fields = (cost.field, "quality", "low", "high", "seeds")
    tips = [alt.Tooltip("run:N"), *(alt.Tooltip(f"{name}:Q", format=",.4~r") for name in fields)]
    line = _layer("front").mark_line(interpolate="step-after", color="var(--front)", strokeDash=[5, 4], strokeWidth=1.5)
    return {
        "front": [line.encode(x=x, y=y)],
        "intervals": [_layer("intervals").mark_rule(strokeWidth=1.5).encode(x=x, y=low, y2="high:Q", color=color)],
        "runs": [
            _layer("runs")
            .mark_point(filled=True, size=110, opacity=1)
            .encode(x=x, y=y, color=color, shape=shape, tooltip=tips)
        ],
        "baselines": [
            _layer("baselines")
            .mark_rule(strokeDash=[2, 3], strokeWidth=1.3)
            .encode(y=y, color=color, tooltip=[tips[0], tips[2]]),
            _layer("baselines")
            .mark_text(align="left", dx=3, dy=-9, fontSize=11)
            .encode(x=alt.value(0), y=y, text="run:N"),
        ],
        **{
            side: [_layer(side).mark_text(align=align, dx=dx, dy=dy, fontSize=FONT_SIZE).encode(x=x, y=y, text="run:N")]
            for side, (align, dx, dy) in LABEL_POSITIONS.items()
        },
    }


def memory_bars(
    rows: Sequence[ChartRow], limit_rows: Sequence[ChartRow], caption: str, title: str = "Peak memory by category"
) -> Chart | None:
    """Return stacked bars of each run's peak memory by category, with its limit; None without data."""
    if not rows:
        return None
    runs = list(dict.fromkeys(str(row["run"]) for row in rows))
    labels = list(MEMORY_CATEGORY_LABELS.values())
    categories = [label for label in labels if any(row["category"] == label for row in rows)]
    colors = [f"var(--m{labels.index(category) % NUM_CATEGORY_COLORS})" for category in categories]
    y = alt.Y("run:N", title=None, sort=runs, axis=alt.Axis(labelLimit=220))
    bars = (
        _layer("runs")
        .mark_bar(stroke="var(--paper)", strokeWidth=1)
        .encode(
            x=alt.X("MiB:Q", title="MiB", stack="zero"),
            y=y,
            order=alt.Order("order:Q"),
            color=alt.Color(
                "category:N", title=None, sort=categories, scale=alt.Scale(domain=categories, range=colors)
            ),
            tooltip=[alt.Tooltip("run:N"), alt.Tooltip("category:N"), alt.Tooltip("MiB:Q", format=",.1f")],
        )
    )
    layers = [bars]
    if limit_rows:
        mark = _layer("budgets").mark_tick(color="var(--ink)", thickness=4, bandSize=34)
        tips = [
            alt.Tooltip("run:N"),
            alt.Tooltip("limit_kind:N", title="limited by"),
            alt.Tooltip("limit:Q", title="MiB", format=",.0f"),
        ]
        layers.append(mark.encode(x="limit:Q", y=y, tooltip=tips))
    return _build_chart(
        "memory",
        title,
        caption,
        alt.layer(*layers).properties(height=34 * len(runs)),
        data={"runs": rows, "budgets": limit_rows},
        fields=["run", "category", "MiB"],
    )


def _curve_samples(rows: Sequence[ChartRow]) -> list[ChartRow]:
    """Return the first, middle and last point of each run's curve."""
    runs: dict[object, list[ChartRow]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    samples = [(points, sorted({0, len(points) // 2, len(points) - 1})) for points in runs.values()]
    return [points[index] for points, indices in samples for index in indices]


def loss_curves(rows: Sequence[ChartRow], groups: ColorGroups) -> list[Chart]:
    """Return a chart of the training loss for each x axis with data."""
    drawn = []
    for axis, axis_title in X_AXES.items():
        known = [row for row in rows if axis in row]
        if not known:
            continue
        color = _color_encoding(groups, known)
        dash = alt.StrokeDash("group:N", legend=None)
        x = alt.X(f"{axis}:Q", title=axis_title)
        scale = alt.Scale(zero=False)
        base = _layer("runs").transform_window(
            smooth="mean(loss)",
            frame=[-SMOOTHING_RADIUS, SMOOTHING_RADIUS],
            groupby=["run"],
            sort=[alt.SortField(axis)],
        )
        tips = [alt.Tooltip("run:N"), alt.Tooltip(f"{axis}:Q", format=",.0f"), alt.Tooltip("loss:Q", format=".3f")]
        chart = alt.layer(
            base.mark_line(strokeWidth=1, opacity=0.22).encode(
                x=x, y=alt.Y("loss:Q", title="training loss (nats)", scale=scale), color=color, detail="run:N"
            ),
            base.mark_line(strokeWidth=1.9).encode(
                x=x,
                y=alt.Y("smooth:Q", title="training loss (nats)", scale=scale),
                color=color,
                detail="run:N",
                strokeDash=dash,
                tooltip=tips,
            ),
        ).properties(height=260)
        num_omitted = len({row["run"] for row in rows} - {row["run"] for row in known})
        caption = f"Over {axis_title}." + (
            f" {num_omitted} runs are omitted: their records lack it." if num_omitted else ""
        )
        drawn.append(
            _build_chart(
                f"loss-{axis}",
                f"Training loss by {axis}",
                caption,
                chart,
                data={"runs": known},
                fields=["run", axis, "loss"],
                table_source=_curve_samples(known),
            )
        )
    return drawn


def held_out_curves(rows: Sequence[ChartRow], groups: ColorGroups) -> list[Chart]:
    """Return the chart of the held-out loss during training; none without data."""
    if not rows:
        return []
    kept = [row for row in rows if row["kept"]]
    x = alt.X("step:Q", title=X_AXES["step"])
    y = alt.Y("loss:Q", title="held-out loss (nats)", scale=alt.Scale(zero=False))
    color = _color_encoding(groups, rows)
    tips = [
        alt.Tooltip("run:N"),
        alt.Tooltip("step:Q", format=",.0f"),
        alt.Tooltip("loss:Q", format=".3f"),
        alt.Tooltip("evaluation seconds:Q", format=",.1f"),
    ]
    lines = _layer("runs").mark_line(strokeWidth=1.9, point=alt.OverlayMarkDef(size=36))
    layers = [lines.encode(x=x, y=y, color=color, detail="run:N", tooltip=tips)]
    if kept:
        layers.append(_layer("kept").mark_point(size=190, strokeWidth=2, filled=False).encode(x=x, y=y, color=color))
    caption = "Loss on the validation split, outside of every measurement of the training." + (
        " A ring marks the step whose weights were saved and evaluated." if kept else ""
    )
    return [
        _build_chart(
            "held-out",
            "Held-out loss during training",
            caption,
            alt.layer(*layers).properties(height=260),
            data={"runs": rows, **({"kept": kept} if kept else {})},
            fields=["run", "step", "loss"],
            table_source=rows,
        )
    ]


def throughput_chart(rows: Sequence[ChartRow], groups: ColorGroups) -> Chart | None:
    """Return real tokens per second with the percentiles of the steps; None without data."""
    if not rows:
        return None
    runs = list(dict.fromkeys(str(row["run"]) for row in rows))
    y = alt.Y("run:N", title=None, sort=runs, axis=alt.Axis(labelLimit=220, grid=True))
    base = _layer("runs")
    color = _color_encoding(groups, rows, legend=False)
    tips = [
        alt.Tooltip("run:N"),
        *(alt.Tooltip(f"{name}:Q", format=",.0f") for name in ("tokens_per_second", "p10", "p90")),
    ]
    title = "real tokens per second"
    chart = alt.layer(
        base.mark_rule(strokeWidth=6, opacity=0.45).encode(
            x=alt.X("p10:Q", title=title), x2="p90:Q", y=y, color=color, tooltip=tips
        ),
        base.mark_point(filled=True, size=90, opacity=1).encode(
            x=alt.X("tokens_per_second:Q", title=title), y=y, color=color, tooltip=tips
        ),
    ).properties(height=28 * len(runs))
    caption = (
        "Point: mean over all timed seconds, as in the table. Bar: 10th to 90th percentile of the timed steps. The "
        "mean can be outside the bar if a few steps were very slow or fast, or if building batches took time."
    )
    return _build_chart(
        "throughput",
        "Throughput",
        caption,
        chart,
        data={"runs": rows},
        fields=["run", "tokens_per_second", "p10", "p90"],
    )


def chart_specs(charts: Sequence[Chart]) -> Mapping[str, dict[str, Any]]:
    """Return Vega-Lite specifications by chart name."""
    return {chart.name: chart.spec for chart in charts}
