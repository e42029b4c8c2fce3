"""A model of every family is planned by its name alone, without the Hub."""

from __future__ import annotations

import pytest

from peftbench.memory.devices import UNKNOWN_DEVICE
from peftbench.memory.families import FamilyMember, load_families
from peftbench.memory.search import MemoryTarget, find_largest_model
from peftbench.methods.lora import Lora
from peftbench.recipe.schema import Recipe
from tests.helpers.workshop import Workshop

SMALLEST = [family.members[0] for family in load_families().values()]

ROWS = {"global_batch_size": 1, "precision": "bf16"}


def build_recipe(workshop: Workshop, path: str) -> Recipe:
    """Return a recipe of LoRA on one row of 32 tokens, with the attention that the architecture supports."""
    return workshop.recipe(
        Lora(r=1, target_modules="all-linear"),
        model={"path": path, "attention": "auto"},
        data={"max_length": 32},
        train=ROWS,
        evaluate={"batch_size": 1},
    )


@pytest.mark.slow
@pytest.mark.parametrize("member", SMALLEST, ids=[member.name for member in SMALLEST])
def test_weights_of_a_plan_are_the_published_parameters(member: FamilyMember, workshop: Workshop) -> None:
    """Frozen weights have two bytes a parameter. Adapters and the buffers of masks (GPT-Neo) add under a quarter."""
    plan = MemoryTarget(UNKNOWN_DEVICE, "a GPU", None).plan(build_recipe(workshop, member.name))
    weights = plan.phase_peaks["backward"].live_bytes_by_category["weights"]
    assert 2 * member.parameters <= weights <= 2.5 * member.parameters


@pytest.mark.slow
def test_largest_model_is_the_last_of_its_family_that_fits(workshop: Workshop) -> None:
    """A budget that the weights of one model use up is enough for the next smaller one."""
    small, large = load_families()["smollm2"].members[1:3]
    budget = 2 * large.parameters  # all of the larger weights, and five times the smaller ones
    target = MemoryTarget(UNKNOWN_DEVICE, "a GPU", budget)
    tried = find_largest_model(build_recipe(workshop, "shipped"), "smollm2", "", target)
    assert [(fit.name, fit.parameters, fit.strategy is not None) for fit in tried] == [
        (large.name, large.parameters, False),
        (small.name, small.parameters, True),
    ]
