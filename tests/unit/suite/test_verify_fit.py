"""Verification of a predicted micro-batch size that is right, too small or too large."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.errors import BudgetError
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts
from peftbench.memory.plan import Verification
from peftbench.memory.search import MemoryTarget, find_strategy
from peftbench.methods.full import Full
from peftbench.recipe.schema import Recipe
from peftbench.record import Device, Outcome, RunRecord
from peftbench.suite.launch import RunResult
from peftbench.suite.verify_fit import check_local_device, verify_strategy
from tests.helpers.workshop import Workshop

BUDGET = 2**31


def verify(workshop: Workshop, fits: int) -> tuple[Verification, list[str], list[Recipe]]:
    """Verify a prediction of 4 of 12 examples on a device that fits ``fits``; return the log and the recipes too."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 12}, evaluate={"batch_size": 2})
    target = MemoryTarget(UNKNOWN_DEVICE, "a GPU", BUDGET)
    strategy = find_strategy(recipe, (), target)
    assert strategy is not None
    strategy = strategy.model_copy(update={"plan": strategy.plan.model_copy(update={"micro_batch_size": 4})})
    log: list[str] = []
    recipes: list[Recipe] = []

    def launch(run_recipe: Recipe) -> RunResult:
        recipes.append(run_recipe)
        kind = "ok" if (run_recipe.train.resolved_micro_batch_size or 0) <= fits else "oom"
        RunRecord(
            name=run_recipe.name,
            started_at="",
            recipe=run_recipe.model_dump(mode="json"),
            recipe_fingerprint="",
            library_versions={},
            device=Device(type="cpu", name="", num_processes=1),
            outcome=Outcome(kind=kind, step=2, step_part="forward", requested_bytes=7),  # type: ignore[arg-type]
        ).write(Path(run_recipe.output_dir) / run_recipe.name)
        return RunResult(run_recipe.name, kind)

    return verify_strategy(recipe, strategy, target, launch=launch, log_message=log.append), log, recipes


@pytest.mark.parametrize(
    ("fits", "tried"),
    [
        (4, [4, 6]),
        (6, [4, 6, 12]),
        (12, [4, 6, 12]),
        (3, [4, 3]),
        (1, [4, 3, 2, 1]),
        (0, [4, 3, 2, 1]),
    ],
)
def test_limit_is_found(fits: int, tried: list[int], workshop: Workshop) -> None:
    """Sizes are tried upwards while they fit, else downwards; each once. The answer is the largest that ran."""
    proof, log, recipes = verify(workshop, fits)
    assert (
        list(proof.outcome_by_micro_batch_size)
        == tried
        == [recipe.train.resolved_micro_batch_size for recipe in recipes]
    )
    assert proof.largest_micro_batch_size == (fits or None)
    assert proof.predicted_micro_batch_size == 4
    assert len(log) == len(tried)
    for recipe in recipes:
        assert (recipe.train.steps, recipe.train.global_batch_size, recipe.data.padding) == (3, 12, "max_length")
        assert recipe.budget.memory_bytes == BUDGET
        assert not Path(recipe.output_dir).exists()


def test_failed_run_is_an_error(workshop: Workshop) -> None:
    """A failure other than out of memory does not count as the limit."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 2}, evaluate={"batch_size": 1})
    target = MemoryTarget(UNKNOWN_DEVICE, "a GPU", BUDGET)
    strategy = find_strategy(recipe, (), target)
    assert strategy is not None
    with pytest.raises(BudgetError, match="cannot verify micro-batch 2: the run ended as failed: no such"):
        verify_strategy(
            recipe, strategy, target, launch=lambda other: RunResult(other.name, "failed", "no such"), log_message=print
        )


def test_verification_needs_the_device_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU can verify only answers for the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_local_device(get_device_facts("cpu"))
    with pytest.raises(BudgetError, match="--verify runs on CPU, but the answer is for Tesla T4; give --device cpu"):
        check_local_device(get_device_facts("t4"))
