"""The edge is looked for from what was predicted, whichever way it was wrong."""

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


def proved(workshop: Workshop, fits: int) -> tuple[Verification, list[str], list[Recipe]]:
    """Of a device on which up to ``fits`` rows fit, where four were predicted of twelve."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 12}, evaluate={"batch_size": 2})
    room = MemoryTarget(UNKNOWN_DEVICE, "a GPU", BUDGET)
    found = find_strategy(recipe, (), room)
    assert found is not None
    found = found.model_copy(update={"plan": found.plan.model_copy(update={"rows": 4})})
    said: list[str] = []
    ran: list[Recipe] = []

    def launch(asked: Recipe) -> RunResult:
        ran.append(asked)
        kind = "ok" if (asked.train.resolved_micro_batch_size or 0) <= fits else "oom"
        RunRecord(
            name=asked.name,
            started_at="",
            recipe=asked.model_dump(mode="json"),
            recipe_fingerprint="",
            library_versions={},
            device=Device(type="cpu", name="", num_processes=1),
            outcome=Outcome(kind=kind, step=2, step_part="forward", requested_bytes=7),  # type: ignore[arg-type]
        ).write(Path(asked.output_dir) / asked.name)
        return RunResult(asked.name, kind)

    return verify_strategy(recipe, found, room, launch=launch, log_message=said.append), said, ran


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
def test_the_edge_is_found(fits: int, tried: list[int], workshop: Workshop) -> None:
    """Upwards while it runs, downwards until it does; each size once, and the answer is what ran."""
    proof, said, ran = proved(workshop, fits)
    assert (
        list(proof.outcome_by_micro_batch_size) == tried == [recipe.train.resolved_micro_batch_size for recipe in ran]
    )
    assert proof.largest_micro_batch_size == (fits or None)
    assert proof.predicted_micro_batch_size == 4
    assert len(said) == len(tried)
    for recipe in ran:
        assert (recipe.train.steps, recipe.train.global_batch_size, recipe.data.padding) == (3, 12, "max_length")
        assert recipe.budget.memory_bytes == BUDGET
        assert not Path(recipe.output_dir).exists()


def test_a_run_that_fails_proves_nothing(workshop: Workshop) -> None:
    """It is no edge, and the answer is not given."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 2}, evaluate={"batch_size": 1})
    room = MemoryTarget(UNKNOWN_DEVICE, "a GPU", BUDGET)
    found = find_strategy(recipe, (), room)
    assert found is not None
    with pytest.raises(BudgetError, match="micro-batches of 2 proves nothing, for it ended as failed: no such"):
        verify_strategy(
            recipe, found, room, launch=lambda asked: RunResult(asked.name, "failed", "no such"), log_message=print
        )


def test_an_answer_is_proved_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU that is the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_local_device(get_device_facts("cpu"))
    with pytest.raises(BudgetError, match="here, on CPU, and the answer is for Tesla T4; give --device cpu"):
        check_local_device(get_device_facts("t4"))
