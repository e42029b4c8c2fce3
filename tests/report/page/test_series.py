"""What the charts draw, from records with known figures."""

from __future__ import annotations

import math

import pytest

from peftbench.record import Breakdown, Device, Memory, Outcome, StateBytes, Throughput, Tokens, TokensPerSecond
from peftbench.report.configurations import configurations
from peftbench.report.page import series
from peftbench.report.page.series import Row
from tests.report.records import judged, noise, record

MIB = 2**20


def test_curves_over_each_that_is_known() -> None:
    """A loss stands at its step, at the tokens and at the seconds that were gone when it was known."""
    (first, second, third) = series.curves([
        record("a", "full", 1, losses=(3.0, 2.0, 1.0), step_tokens=(10, 20, 30), step_seconds=(0.5, 0.25, 0.25))
    ])  # fmt: skip
    assert [first[name] for name in ("loss", "step", "tokens", "seconds")] == [3.0, 1.0, 10.0, 0.5]
    assert [second[name] for name in ("loss", "step", "tokens", "seconds")] == [2.0, 2.0, 30.0, 0.75]
    assert [third[name] for name in ("loss", "step", "tokens", "seconds")] == [1.0, 3.0, 60.0, 1.0]
    (older,) = series.curves([record("b", "full", 1, losses=(3.0,), step_seconds=(0.5,))])
    assert "tokens" not in older


def test_long_curves_are_thinned_to_means() -> None:
    """Of 1,000 steps 200 points are left, each the mean of five, and no step is lost or counted twice."""
    losses = tuple(float(step) for step in range(1000))
    rows = series.curves([record("a", "full", 1, losses=losses, step_seconds=(1.0,) * 1000)])
    assert len(rows) == series.POINTS
    assert rows[0]["loss"] == 2.0
    assert rows[-1]["loss"] == 997.0
    assert sum(float(row["loss"] or 0) for row in rows) * 5 == sum(losses)


def test_a_loss_that_is_no_number_is_no_point() -> None:
    """JSON has no NaN, and a page that held one would show nothing."""
    rows = series.curves([record("a", "full", 1, losses=(1.0, math.nan, math.inf))])
    assert [row["loss"] for row in rows] == [1.0, None, None]


def test_memory_adds_up_to_the_peak() -> None:
    """Known parts and a rest make the peak of the training, to the last byte; a breakdown tells more parts apart."""
    peak = {"train": Memory(allocated_bytes=100 * MIB)}
    states = StateBytes(weights=10 * MIB, gradients=10 * MIB, optimizer=20 * MIB)
    kinds = {"weights": 10 * MIB, "activations": 55 * MIB, "logits": 0, "temporaries": 7}
    found = Breakdown(step=5, rows=1, width=8, peak_bytes=1, bytes_by_kind=kinds, operation="x", part="backward")
    plain, detailed = record("a", "full", 1, memory=peak, state_bytes=states), record("b", "full", 1, memory=peak)
    rows = series.memory([plain, detailed.model_copy(update={"breakdown": found, "state_bytes": states})])
    for run in ("a (full)", "b (full)"):
        assert sum(int(row["bytes"] or 0) for row in rows if row["run"] == run) == 100 * MIB
    parts = [row["part"] for row in rows if row["run"] == "b (full)"]
    assert parts == ["weights", "activations", "temporaries", "the rest of the peak"]
    assert [row["part"] for row in rows if row["run"] == "a (full)"][-1] == "the rest of the peak"


def test_an_out_of_memory_shows_what_it_held_and_asked_for() -> None:
    """Its bar is as long as what would have been needed at that moment."""
    outcome = Outcome(kind="oom", step=1, held_bytes=90 * MIB, requested_bytes=30 * MIB)
    rows = series.memory([record("a", "full", 1, outcome=outcome, memory={"warmup": Memory(allocated_bytes=MIB)})])
    assert [(row["part"], row["bytes"]) for row in rows] == [
        ("held when refused", 90 * MIB), ("asked for and refused", 30 * MIB)
    ]  # fmt: skip


def _budgeted(budget: str | None, device_bytes: int | None, peak: int) -> list[Row]:
    one = record("a", "full", 1, memory={"train": Memory(allocated_bytes=peak)})
    recipe = one.recipe | {"budget": {"memory": budget}}
    device = Device(kind="cuda", name="a GPU", processes=1, memory_bytes=device_bytes)
    return series.budgets([one.model_copy(update={"recipe": recipe, "device": device})])[0]


@pytest.mark.parametrize(
    ("budget", "device_bytes", "line"), [("112MiB", 8 * 2**30, 112.0), (None, 300 * MIB, 300.0), (None, None, None)]
)
def test_the_budget_is_the_recipes_or_the_devices(
    budget: str | None, device_bytes: int | None, line: float | None
) -> None:
    """A run is held to its budget, else to what its device has; where neither is known there is no line."""
    rows = _budgeted(budget, device_bytes, 100 * MIB)
    assert [row["budget"] for row in rows] == ([] if line is None else [line])


def test_a_budget_far_away_is_told_and_not_drawn() -> None:
    """A line at a hundred times the longest bar would leave no bar to be seen."""
    one = record("a", "full", 1, memory={"train": Memory(allocated_bytes=MIB)})
    device = Device(kind="cuda", name="a GPU", processes=1, memory_bytes=100 * MIB)
    assert series.budgets([one.model_copy(update={"device": device})]) == ([], 100 * MIB)


def test_speed_spreads_from_slow_to_fast() -> None:
    """At 1,000 tokens a step, steps of 0.5 to 2 s are 500 to 2,000 tokens a second."""
    each = TokensPerSecond(real=1100.0, padded=1.0, labelled=1.0, virtual=0.0)
    speed = Throughput(
        steps=8, step_seconds_median=1.0, step_seconds_p10=0.5, step_seconds_p90=2.0, samples_per_second=1.0,
        tokens_per_second=each, data_share=0.0,
    )  # fmt: skip
    tokens = Tokens(real=10_000, padded=1, labelled=1, virtual=0)
    (row,) = series.speed([record("a", "full", 1, throughput=speed, tokens=tokens, steps=10)])
    assert (row["speed"], row["slow"], row["fast"]) == (1100.0, 500.0, 2000.0)


def test_the_pareto_front_by_hand() -> None:
    """On it are those that nothing is better than at the same cost or less; ties and the dominated are not."""
    points: list[Row] = [
        {"run": "cheap", "cost": 1.0, "quality": 10.0}, {"run": "worse and dearer", "cost": 2.0, "quality": 9.0},
        {"run": "as good and dearer", "cost": 2.5, "quality": 10.0}, {"run": "dear", "cost": 3.0, "quality": 12.0},
        {"run": "as dear and worse", "cost": 3.0, "quality": 11.0}, {"run": "unknown", "cost": None, "quality": 99.0},
    ]  # fmt: skip
    best = series.front(points, "cost", "quality", more_is_better=True)
    assert [point["run"] for point in best] == ["cheap", "dear"]
    turned = [point | {"quality": -float(point["quality"] or 0)} for point in points]
    assert [p["run"] for p in series.front(turned, "cost", "quality", more_is_better=False)] == ["cheap", "dear"]


def test_a_point_is_of_all_seeds() -> None:
    """With seeds a point is their mean and its interval theirs; alone it has the interval of its record."""
    runs = [record(f"a-seed={s}", "lora", 10, seed=s, phase_seconds={"train": 10.0 + s}) for s in range(3)]
    (found,) = series.points(configurations(runs), rouge=True)
    assert (found["run"], found["quality"], found["seconds"], found["seeds"]) == ("a (lora)", 31.25, 11.0, 3)
    assert (found["low"], found["high"]) == (31.25, 31.25)
    (alone,) = series.points(configurations(runs[:1]), rouge=True)
    assert (alone["low"], alone["high"]) == (30.0, 32.5)


def test_a_loss_has_an_interval_over_its_examples() -> None:
    """Of a loss by tokens the interval is around it, and inside of the least and the largest of the examples."""
    losses = noise(40, 1)
    (found,) = series.points(
        configurations([judged("a", "lora", None, losses=losses, labelled=(10,) * 40)]), rouge=False
    )
    assert found["quality"] == pytest.approx(sum(losses) / 400)
    low, high = float(found["low"] or 0), float(found["high"] or 0)
    assert min(losses) / 10 < low < float(found["quality"] or 0) < high < max(losses) / 10
