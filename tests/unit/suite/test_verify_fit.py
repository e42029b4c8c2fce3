"""Verification of a predicted micro-batch size that is right, too small or too large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftbench.errors import BudgetError
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts
from peftbench.memory.plan import Strategy
from peftbench.memory.search import MemoryTarget, find_strategy
from peftbench.methods.full import Full
from peftbench.recipe.schema import Recipe
from peftbench.record import Outcome
from peftbench.suite.launch import RunResult
from peftbench.suite.verify_fit import check_local_device, verify_strategy
from tests.helpers.records import minimal_record
from tests.helpers.workshop import Workshop

BUDGET = 2**31


@pytest.fixture
def planned(workshop: Workshop) -> tuple[Recipe, Strategy, MemoryTarget]:
    """Return a recipe of 12 examples per step, a strategy that predicts micro-batches of 4, and its target."""
    recipe = workshop.recipe(
        Full(), train={"global_batch_size": 12, "steps": 99}, schedule={"warmup_steps": 12}, evaluate={"batch_size": 2}
    )
    target = MemoryTarget(UNKNOWN_DEVICE, "a GPU", BUDGET)
    strategy = find_strategy(recipe, (), target)
    assert strategy is not None
    plan = strategy.plan.model_copy(update={"micro_batch_size": 4})
    return recipe, strategy.model_copy(update={"plan": plan}), target


def make_launch(fits: int, recipes: list[Recipe]) -> Callable[[Recipe], RunResult]:
    """Return a fake launch on a device that fits ``fits`` examples; it appends each recipe to ``recipes``."""

    def launch(recipe: Recipe) -> RunResult:
        recipes.append(recipe)
        kind = "ok" if (recipe.train.resolved_micro_batch_size or 0) <= fits else "oom"
        outcome = Outcome(kind=kind, step=2, step_part="forward", requested_bytes=7)  # type: ignore[arg-type]
        minimal_record(name=recipe.name, recipe=recipe.model_dump(mode="json"), outcome=outcome).write(
            Path(recipe.output_dir) / recipe.name
        )
        return RunResult(recipe.name, kind)

    return launch


def test_verification_reports_the_largest_size_that_ran(planned: tuple[Recipe, Strategy, MemoryTarget]) -> None:
    """Larger sizes are tried while they fit; if the predicted one does not, smaller ones are. Each size runs once."""
    expected = {4: [4, 6], 6: [4, 6, 12], 12: [4, 6, 12], 3: [4, 3], 1: [4, 3, 2, 1], 0: [4, 3, 2, 1]}
    for fits, sizes in expected.items():
        recipes: list[Recipe] = []
        log: list[str] = []
        verification = verify_strategy(*planned, launch=make_launch(fits, recipes), log_message=log.append)
        assert list(verification.outcome_by_micro_batch_size) == sizes
        assert [recipe.train.resolved_micro_batch_size for recipe in recipes] == sizes
        assert verification.largest_micro_batch_size == (fits or None)
        assert verification.predicted_micro_batch_size == 4
        assert len(log) == len(sizes)
        for recipe in recipes:
            assert (recipe.train.steps, recipe.train.global_batch_size, recipe.data.padding) == (3, 12, "max_length")
            assert recipe.budget.memory_bytes == BUDGET
            assert Recipe.model_validate(recipe.model_dump()) == recipe
            assert not Path(recipe.output_dir).exists()
    # A failure other than out of memory does not count as the limit.
    with pytest.raises(BudgetError, match="cannot verify micro-batch 4: the run ended as failed: no such"):
        verify_strategy(*planned, launch=lambda recipe: RunResult(recipe.name, "failed", "no such"), log_message=print)


def test_verification_needs_the_estimated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU can verify only estimates for the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_local_device(get_device_facts("cpu"))
    with pytest.raises(BudgetError, match="--verify runs on CPU, but the answer is for Tesla T4; give --device cpu"):
        check_local_device(get_device_facts("t4"))
