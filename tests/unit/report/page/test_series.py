"""Data rows of the charts, from records with known values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from peftbench.record import HeldOutCurve, HeldOutPoint, RunRecord, Throughput, Tokens, TokensPerSecond
from peftbench.report.analysis.quality_metrics import HELD_OUT_LOSS, QualityMetric
from peftbench.report.analysis.run_groups import group_runs
from peftbench.report.page import series
from peftbench.report.page.content import build_page_data
from peftbench.report.page.series import ChartRow, ColorGroups
from tests.helpers.scores import DEFINITIONS
from tests.unit.report.records import build_judged_record, build_record, draw_scores

ROUGE_L = QualityMetric("rougeL", DEFINITIONS["rougeL"])


def curve_rows(*records: RunRecord) -> list[ChartRow]:
    """Return the rows of the loss curves."""
    return series.loss_curve_rows(records, ColorGroups.from_run_groups(group_runs(records)))


def trade_off_points(records: list[RunRecord], metric: QualityMetric) -> list[ChartRow]:
    """Return the points of the trade-off charts."""
    run_groups = group_runs(records)
    return series.trade_off_rows(run_groups, ColorGroups.from_run_groups(run_groups), metric)


def test_loss_curves_have_steps_tokens_and_seconds() -> None:
    """Check that each loss has its step and the cumulative tokens and seconds, or no tokens in an older record."""
    first, second, third = curve_rows(
        build_record(
            "a", "full", 1, step_losses=(3.0, 2.0, 1.0), step_tokens=(10, 20, 30), step_seconds=(0.5, 0.25, 0.25)
        )
    )
    assert [first[name] for name in ("loss", "step", "tokens", "seconds")] == [3.0, 1.0, 10.0, 0.5]
    assert [second[name] for name in ("loss", "step", "tokens", "seconds")] == [2.0, 2.0, 30.0, 0.75]
    assert [third[name] for name in ("loss", "step", "tokens", "seconds")] == [1.0, 3.0, 60.0, 1.0]
    (older,) = curve_rows(build_record("b", "full", 1, step_losses=(3.0,), step_seconds=(0.5,)))
    assert "tokens" not in older


def test_long_curves_are_downsampled_to_means() -> None:
    """Check that 1,000 steps become 200 points, each the mean of five steps."""
    losses = tuple(float(step) for step in range(1000))
    rows = curve_rows(build_record("a", "full", 1, step_losses=losses, step_seconds=(1.0,) * 1000))
    assert len(rows) == series.MAX_CURVE_POINTS
    assert rows[0]["loss"] == 2.0
    assert rows[-1]["loss"] == 997.0
    assert sum(float(row["loss"] or 0) for row in rows) * 5 == sum(losses)


def test_non_finite_loss_becomes_none() -> None:
    """Check NaN and infinity, which JSON cannot represent."""
    rows = curve_rows(build_record("a", "full", 1, step_losses=(1.0, math.nan, math.inf)))
    assert [row["loss"] for row in rows] == [1.0, None, None]


def _throughput_row(**changes: Any) -> ChartRow:
    rates = TokensPerSecond(real=1100.0, padded=1.0, labeled=1.0, virtual=0.0)
    throughput = Throughput(
        steps=8,
        step_seconds_median=1.0,
        step_seconds_p10=0.5,
        step_seconds_p90=2.0,
        samples_per_second=1.0,
        tokens_per_second=rates,
        data_time_fraction=0.0,
    )
    tokens = Tokens(real=10_000, padded=1, labeled=1, virtual=0)
    run = build_record("a", "full", 1, throughput=throughput, tokens=tokens, steps=10, **changes)
    (row,) = series.throughput_rows([run], ColorGroups.from_run_groups(group_runs([run])))
    return row


def test_throughput_percentiles_are_over_timed_steps() -> None:
    """Check steps of 100 to 1,100 tokens per second; untimed steps, also after a resume, do not count."""
    tokens = (9999, *range(100, 700, 100), 9999, *range(700, 1200, 100))
    row = _throughput_row(step_tokens=tokens, step_seconds=(1.0,) * 13, untimed_steps=1, resumed_after=(7,))
    assert (row["tokens_per_second"], row["p10"], row["p90"]) == (1100.0, 200.0, 1000.0)


def test_throughput_percentiles_of_an_older_record_use_step_seconds() -> None:
    """Check that steps of 0.5 to 2 s at 1,000 tokens per step give 500 to 2,000 tokens per second."""
    row = _throughput_row()
    assert (row["tokens_per_second"], row["p10"], row["p90"]) == (1100.0, 500.0, 2000.0)


def test_colors_are_by_configuration_up_to_eight() -> None:
    """Check that each of eight configurations has a color; with nine, each method has one."""
    runs = [build_record(f"r{n}", "lora" if n % 2 else "full", 10, method={"r": n}) for n in range(9)]
    few, many = (ColorGroups.from_run_groups(group_runs(subset)) for subset in (runs[:8], runs))
    assert (few.title, len(few.names)) == ("run", 8)
    assert (many.title, set(many.names)) == ("method", {"lora", "full"})
    assert few[runs[3]] == "r3 (lora)"
    assert many[runs[3]] == "lora"


def test_pareto_front_matches_points_chosen_by_hand() -> None:
    """Check that a point is on the front if no other is as good or better at the same or a lower cost."""
    points: list[ChartRow] = [
        {"run": "cheap", "cost": 1.0, "quality": 10.0},
        {"run": "worse, more expensive", "cost": 2.0, "quality": 9.0},
        {"run": "as good, more expensive", "cost": 2.5, "quality": 10.0},
        {"run": "expensive", "cost": 3.0, "quality": 12.0},
        {"run": "as expensive, worse", "cost": 3.0, "quality": 11.0},
        {"run": "unknown", "cost": None, "quality": 99.0},
    ]
    best = series.pareto_front(points, "cost", "quality", higher_is_better=True)
    assert [point["run"] for point in best] == ["cheap", "expensive"]
    negated = [point | {"quality": -float(point["quality"] or 0)} for point in points]
    assert [p["run"] for p in series.pareto_front(negated, "cost", "quality", higher_is_better=False)] == [
        "cheap",
        "expensive",
    ]


def test_trade_off_point_averages_seeds() -> None:
    """Check the mean and its interval for several seeds; a single seed has the interval of its record."""
    runs = [build_record(f"a-seed={s}", "lora", 10, seed=s, phase_seconds={"train": 10.0 + s}) for s in range(3)]
    (point,) = trade_off_points(runs, ROUGE_L)
    assert (point["run"], point["quality"], point["seconds"], point["seeds"]) == ("a (lora)", 31.25, 11.0, 3)
    assert (point["low"], point["high"]) == (31.25, 31.25)
    (single_seed,) = trade_off_points(runs[:1], ROUGE_L)
    assert (single_seed["low"], single_seed["high"]) == (30.0, 32.5)


def test_loss_of_one_seed_has_an_interval_over_examples() -> None:
    """Check that the interval contains the loss and is within the range of the losses of the examples."""
    losses = draw_scores(40, 1)
    (point,) = trade_off_points(
        [build_judged_record("a", "lora", None, losses=losses, labeled=(10,) * 40)], HELD_OUT_LOSS
    )
    assert point["quality"] == pytest.approx(sum(losses) / 400)
    low, high = float(point["low"] or 0), float(point["high"] or 0)
    assert min(losses) / 10 < low < float(point["quality"] or 0) < high < max(losses) / 10


def build_curve(*losses: float, kept_step: int | None = None) -> HeldOutCurve:
    """Return the curve of evaluations after every ten steps."""
    points = tuple(HeldOutPoint(step=10 * n, loss=loss, seconds=0.5) for n, loss in enumerate(losses, start=1))
    return HeldOutCurve(split="validation", num_examples=8, points=points, kept_step=kept_step)


def test_held_out_curve_marks_the_kept_step() -> None:
    """A run without evaluations has no row; a loss that is not finite is None."""
    records = [
        build_record("a", "full", 1, held_out_curve=build_curve(3.0, math.inf, 2.0, kept_step=30)),
        build_record("b", "lora", 1),
    ]
    rows = series.held_out_curve_rows(records, ColorGroups.from_run_groups(group_runs(records)))
    assert [(row["step"], row["loss"], row["kept"]) for row in rows] == [(10, 3.0, 0), (20, None, 0), (30, 2.0, 1)]
    assert {row["run"] for row in rows} == {"a (full)"}


def test_held_out_chart_is_on_the_page() -> None:
    """Its specification is drawn, with a ring only if weights were kept; records without a curve have no chart."""
    import vl_convert

    records = {
        Path("a/record.json"): build_record("a", "full", 1, held_out_curve=build_curve(3.0, 2.0, kept_step=20)),
        Path("b/record.json"): build_record("b", "lora", 1, held_out_curve=build_curve(3.0, 2.5)),
    }
    chart = {chart.name: chart for chart in build_page_data(records, "suite", []).all_charts}["held-out"]
    assert "ring" in chart.caption
    assert chart.table_rows == [
        ["a (full)", "10", "3"],
        ["a (full)", "20", "2"],
        ["b (lora)", "10", "3"],
        ["b (lora)", "20", "2.5"],
    ]
    assert vl_convert.vegalite_to_svg(chart.spec).count("<path") > 4
    without = {Path("a/record.json"): build_record("a", "full", 1)}
    assert "held-out" not in {chart.name for chart in build_page_data(without, "suite", []).all_charts}
