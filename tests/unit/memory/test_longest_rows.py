"""The longest rows that fit a budget, and how few plans find them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import pytest

from peftbench.memory import longest_rows
from peftbench.memory.devices import get_device_facts
from peftbench.memory.longest_rows import find_longest_rows
from peftbench.memory.plan import RowLimit
from peftbench.memory.search import MemoryTarget
from peftbench.methods.full import Full
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.report.tables.memory_plan import format_plan
from tests.helpers.models import POSITIONS

if TYPE_CHECKING:
    from peftbench.memory.plan import Plan
    from peftbench.methods.base import Method
    from peftbench.recipe.schema import Recipe
    from tests.helpers.workshop import Workshop

BYTES_PER_TOKEN = 1000


@dataclass(frozen=True)
class LinearTarget(MemoryTarget):
    """A device on which each token of a row needs the same memory; counts the plans."""

    base_plan: ClassVar[Plan]
    planned: list[int] = field(default_factory=list)

    def plan(self, recipe: Recipe) -> Plan:
        """Return the base plan with bytes for this row length."""
        length = recipe.data.max_length
        assert length is not None
        self.planned.append(length)
        size = length * BYTES_PER_TOKEN
        verdict = "fits" if size <= self.required_budget else "does not fit"
        return self.base_plan.model_copy(
            update={"sequence_length": length, "process_bytes": (size, size), "verdict": verdict}
        )


def build_target(budget_bytes: int | None) -> MemoryTarget:
    """Return the CPU with a budget."""
    return MemoryTarget(get_device_facts("cpu"), "cpu", budget_bytes)


@pytest.fixture
def recipe(workshop: Workshop) -> Recipe:
    """Return a recipe with rows of 32 tokens."""
    return workshop.recipe(Full(), data={"max_length": 32}, evaluate={"max_new_tokens": 4})


@pytest.mark.parametrize("tokens", [9, 16, 31, 32, 33, 50, 63])
def test_search_finds_the_largest_length_with_few_plans(
    tokens: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every budget the result is the largest length of the grid that fits, from at most five more plans."""
    monkeypatch.setattr(longest_rows, "_LENGTH_STEP", 4)
    monkeypatch.setattr(LinearTarget, "base_plan", build_target(None).plan(recipe), raising=False)
    target = LinearTarget(get_device_facts("cpu"), "cpu", tokens * BYTES_PER_TOKEN)
    own = target.plan(recipe)
    target.planned.clear()
    assert find_longest_rows(recipe, target, own) == RowLimit(tokens=tokens // 4 * 4, is_model_limit=False)
    assert len(target.planned) <= 5


@pytest.mark.parametrize("method", [Full(), PromptTuning(num_virtual_tokens=5)], ids=["full", "prompt_tuning"])
def test_rows_end_at_the_limit_of_the_model(method: Method, workshop: Workshop) -> None:
    """With a budget for any length, rows take all positions that virtual tokens leave."""
    recipe = workshop.recipe(method, data={"max_length": 32}, evaluate={"max_new_tokens": 4})
    target = build_target(1 << 40)
    plan = target.plan(recipe)
    limit = find_longest_rows(recipe, target, plan)
    assert limit == RowLimit(tokens=POSITIONS - method.virtual_tokens, is_model_limit=True)
    text = format_plan(plan.model_copy(update={"longest_rows": limit}))
    assert f"micro-batches of 6: data.max_length={limit.tokens} fits (all that the model has positions for)" in text


def test_nothing_is_found_if_the_weights_do_not_fit(recipe: Recipe) -> None:
    """A budget below the weights leaves no length."""
    target = build_target(1 << 20)
    assert find_longest_rows(recipe, target, target.plan(recipe)) is None


def test_found_length_fits_in_a_plan_of_its_own(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """``data.max_length`` at the result has the verdict "fits"; one step more has not."""
    monkeypatch.setattr(longest_rows, "_LENGTH_STEP", 4)
    whole = build_target(None).plan(recipe)
    target = build_target(whole.process_bytes[1] + 1)
    limit = find_longest_rows(recipe, target, target.plan(recipe))
    assert limit is not None

    def plan(length: int) -> Plan:
        return target.plan(recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})}))

    assert plan(limit.tokens).verdict == "fits"
    assert plan(limit.tokens + 4).verdict != "fits"
