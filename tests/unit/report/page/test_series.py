"""What the charts draw, from records with known figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peftbench.record import RunRecord, Throughput, Tokens, TokensPerSecond
from peftbench.report.analysis.run_groups import group_runs
from peftbench.report.page import series
from peftbench.report.page.series import ChartRow, ColorGroups
from tests.unit.report.records import judged, noise, record


def curves(*records: RunRecord) -> list[ChartRow]:
    """Their curves."""
    return series.loss_curve_rows(records, ColorGroups.from_run_groups(group_runs(records)))


def points(records: list[RunRecord], *, rouge: bool) -> list[ChartRow]:
    """Their points."""
    every = group_runs(records)
    return series.trade_off_rows(every, ColorGroups.from_run_groups(every), uses_rouge=rouge)


def test_curves_over_each_that_is_known() -> None:
    """A loss stands at its step, at the tokens and at the seconds that were gone when it was known."""
    first, second, third = curves(
        record("a", "full", 1, step_losses=(3.0, 2.0, 1.0), step_tokens=(10, 20, 30), step_seconds=(0.5, 0.25, 0.25))
    )
    assert [first[name] for name in ("loss", "step", "tokens", "seconds")] == [3.0, 1.0, 10.0, 0.5]
    assert [second[name] for name in ("loss", "step", "tokens", "seconds")] == [2.0, 2.0, 30.0, 0.75]
    assert [third[name] for name in ("loss", "step", "tokens", "seconds")] == [1.0, 3.0, 60.0, 1.0]
    (older,) = curves(record("b", "full", 1, step_losses=(3.0,), step_seconds=(0.5,)))
    assert "tokens" not in older


def test_long_curves_are_thinned_to_means() -> None:
    """Of 1,000 steps 200 points are left, each the mean of five, and no step is lost or counted twice."""
    losses = tuple(float(step) for step in range(1000))
    rows = curves(record("a", "full", 1, step_losses=losses, step_seconds=(1.0,) * 1000))
    assert len(rows) == series.MAX_CURVE_POINTS
    assert rows[0]["loss"] == 2.0
    assert rows[-1]["loss"] == 997.0
    assert sum(float(row["loss"] or 0) for row in rows) * 5 == sum(losses)


def test_a_loss_that_is_no_number_is_no_point() -> None:
    """JSON has no NaN, and a page that held one would show nothing."""
    rows = curves(record("a", "full", 1, step_losses=(1.0, math.nan, math.inf)))
    assert [row["loss"] for row in rows] == [1.0, None, None]


def _speed(**changes: Any) -> ChartRow:
    each = TokensPerSecond(real=1100.0, padded=1.0, labelled=1.0, virtual=0.0)
    speed = Throughput(
        steps=8,
        step_seconds_median=1.0,
        step_seconds_p10=0.5,
        step_seconds_p90=2.0,
        samples_per_second=1.0,
        tokens_per_second=each,
        data_time_fraction=0.0,
    )
    tokens = Tokens(real=10_000, padded=1, labelled=1, virtual=0)
    one = record("a", "full", 1, throughput=speed, tokens=tokens, steps=10, **changes)
    (row,) = series.throughput_rows([one], ColorGroups.from_run_groups(group_runs([one])))
    return row


def test_speed_spreads_over_the_timed_steps() -> None:
    """Of steps of 100 to 1,100 tokens in a second each, evenly; warm-ups, a resumption's too, do not count."""
    tokens = (9999, *range(100, 700, 100), 9999, *range(700, 1200, 100))
    row = _speed(step_tokens=tokens, step_seconds=(1.0,) * 13, untimed_steps=1, resumed_after=(7,))
    assert (row["tokens_per_second"], row["p10"], row["p90"]) == (1100.0, 200.0, 1000.0)


def test_speed_of_an_older_record_spreads_by_its_percentiles() -> None:
    """At 1,000 tokens a step, steps of 0.5 to 2 s are 500 to 2,000 tokens a second."""
    row = _speed()
    assert (row["tokens_per_second"], row["p10"], row["p90"]) == (1100.0, 500.0, 2000.0)


def test_groups_are_configurations_where_they_are_few() -> None:
    """Each of eight configurations has a colour; of nine, methods have one, and every run has one of them."""
    runs = [record(f"r{n}", "lora" if n % 2 else "full", 10, method={"r": n}) for n in range(9)]
    few, many = (ColorGroups.from_run_groups(group_runs(some)) for some in (runs[:8], runs))
    assert (few.title, len(few.names)) == ("run", 8)
    assert (many.title, set(many.names)) == ("method", {"lora", "full"})
    assert few[runs[3]] == "r3 (lora)"
    assert many[runs[3]] == "lora"


def test_the_pareto_front_by_hand() -> None:
    """On it are those that nothing is better than at the same cost or less; ties and the dominated are not."""
    points: list[ChartRow] = [
        {"run": "cheap", "cost": 1.0, "quality": 10.0},
        {"run": "worse and dearer", "cost": 2.0, "quality": 9.0},
        {"run": "as good and dearer", "cost": 2.5, "quality": 10.0},
        {"run": "dear", "cost": 3.0, "quality": 12.0},
        {"run": "as dear and worse", "cost": 3.0, "quality": 11.0},
        {"run": "unknown", "cost": None, "quality": 99.0},
    ]
    best = series.pareto_front(points, "cost", "quality", higher_is_better=True)
    assert [point["run"] for point in best] == ["cheap", "dear"]
    turned = [point | {"quality": -float(point["quality"] or 0)} for point in points]
    assert [p["run"] for p in series.pareto_front(turned, "cost", "quality", higher_is_better=False)] == [
        "cheap",
        "dear",
    ]


def test_a_point_is_of_all_seeds() -> None:
    """With seeds a point is their mean and its interval theirs; alone it has the interval of its record."""
    runs = [record(f"a-seed={s}", "lora", 10, seed=s, phase_seconds={"train": 10.0 + s}) for s in range(3)]
    (found,) = points(runs, rouge=True)
    assert (found["run"], found["quality"], found["seconds"], found["seeds"]) == ("a (lora)", 31.25, 11.0, 3)
    assert (found["low"], found["high"]) == (31.25, 31.25)
    (alone,) = points(runs[:1], rouge=True)
    assert (alone["low"], alone["high"]) == (30.0, 32.5)


def test_a_loss_has_an_interval_over_its_examples() -> None:
    """Of a loss by tokens the interval is around it, and inside of the least and the largest of the examples."""
    losses = noise(40, 1)
    (found,) = points([judged("a", "lora", None, losses=losses, labelled=(10,) * 40)], rouge=False)
    assert found["quality"] == pytest.approx(sum(losses) / 400)
    low, high = float(found["low"] or 0), float(found["high"] or 0)
    assert min(losses) / 10 < low < float(found["quality"] or 0) < high < max(losses) / 10
