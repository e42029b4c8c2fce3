"""The plan in a record: predicted for the run's own rows, and equal to what the run measured."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch

from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.recipe.schema import Profile
from peftbench.record import RecordedPlan, read_record
from peftbench.run.runner import Run
from peftbench.run.training_plan import plan_training
from tests.helpers.corpus import write_corpus
from tests.helpers.short_runs import use_small_matmul
from tests.helpers.training import reset_accelerators

if TYPE_CHECKING:
    from pathlib import Path

    from peftbench.data.sources import Files
    from peftbench.recipe.schema import Recipe
    from peftbench.record import RunRecord
    from peftbench.run.state import RunState
    from tests.helpers.workshop import Workshop

WIDTH = 48
BREAKDOWN = Profile(untimed_steps=2, memory_breakdown=True)


def run_with_plan(recipe: Recipe, planner: Any = plan_training) -> RunRecord:
    """Run a recipe as the command line does, with a plan, and return the record that was written."""
    reset_accelerators()
    with use_small_matmul():
        _, path = Run(recipe, planner=planner).execute()
    return read_record(path)


def list_random_state() -> list[Any]:
    """Return the state of each random number generator of this process."""
    _, numbers, *rest = numpy.random.get_state(legacy=True)
    return [random.getstate(), list(numbers), rest, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("tokens", [None, 3 * WIDTH])
@pytest.mark.parametrize("padding", ["max_length", "free"])
def test_planned_live_bytes_equal_those_of_the_run(
    padding: str, tokens: int | None, workshop: Workshop, sources: dict[str, Files]
) -> None:
    """The peak of live tensors is predicted to the byte, for rows with equal numbers of tokens and labels."""
    recipe = workshop.recipe(
        Lora(r=2),
        data={"padding": padding, "max_length": WIDTH, "source": sources[padding]},
        train={"micro_batch_tokens": tokens},
        profile=BREAKDOWN,
    )
    record = run_with_plan(recipe)
    assert record.plan is not None
    assert record.plan.reason is None
    assert record.memory_breakdown is not None
    assert record.plan.predicted is not None
    planned = record.plan.predicted
    rows = 6 if tokens is None else 3
    assert (planned.micro_batch_size, planned.sequence_length) == (rows, WIDTH)
    assert planned.measured_positions == rows * WIDTH
    assert planned.live_bytes == record.memory_breakdown.peak_bytes
    assert planned.live_bytes <= planned.allocated_bytes <= planned.reserved_bytes <= planned.process_bytes[0]


def test_plan_is_for_the_longest_row_of_the_run(workshop: Workshop, tmp_path: Path) -> None:
    """A larger data.max_length, which no row reaches, does not change the plan."""
    short = [{"id": str(index), "article": "storm", "summary": "vote"} for index in range(8)]
    source = write_corpus(tmp_path, {"train": short, "test": short})
    plans = [
        run_with_plan(workshop.recipe(Full(), data={"source": source, "padding": "longest", "max_length": length})).plan
        for length in (64, 60)
    ]
    assert plans[0] is not None
    assert plans[0].predicted is not None
    assert plans[0].predicted.sequence_length < 60
    assert plans[0] == plans[1]


def test_unmodeled_run_has_a_reason(workshop: Workshop) -> None:
    """A plan that the estimate refuses leaves the outcome as it is."""
    record = run_with_plan(workshop.recipe(Full(), train={"precision": "bf16"}))
    assert record.outcome.kind == "ok"
    assert record.plan is not None
    assert record.plan.predicted is None
    assert record.plan.reason is not None
    assert "train.precision=bf16 on CPU" in record.plan.reason


def test_mistake_in_the_prediction_is_a_reason(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with results does not fail because of its plan."""

    def fail(_: object) -> None:
        raise KeyError("layer")

    monkeypatch.setattr("peftbench.run.training_plan.build_plan", fail)
    record = run_with_plan(workshop.recipe(Full()))
    assert record.outcome.kind == "ok"
    assert record.plan == RecordedPlan(reason="the prediction failed: KeyError: 'layer'")


def test_run_without_a_planner_has_no_plan(workshop: Workshop) -> None:
    """Only the command line asks for a plan."""
    assert run_with_plan(workshop.recipe(Full()), planner=None).plan is None


def test_plan_changes_no_measurement_and_no_random_state(workshop: Workshop) -> None:
    """The record before the plan has the same measurements, and the plan draws no random numbers."""
    before: dict[str, Any] = {}

    def plan_and_compare(state: RunState) -> RecordedPlan:
        before["record"] = read_record(state.run_dir.record_file)
        random_state = list_random_state()
        plan = plan_training(state)
        assert list_random_state() == random_state
        return plan

    record = run_with_plan(workshop.recipe(Lora(r=2)), planner=plan_and_compare)
    assert record.plan is not None
    assert record.model_copy(update={"plan": None}) == before["record"]
