"""The largest micro-batch is the largest, and each way of saving memory is tried once."""

from __future__ import annotations

import pytest

from peftbench.errors import BudgetError
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts
from peftbench.memory.estimate import estimate
from peftbench.memory.search import (
    TECHNIQUES,
    MemoryTarget,
    apply_strategy,
    find_largest_fitting,
    find_strategy,
    list_micro_batch_sizes,
    list_technique_sets,
    with_micro_batch,
)
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.optim import OPTIMIZERS
from tests.helpers.workshop import Workshop

NAMES = [technique.name for technique in TECHNIQUES]


SIZES = [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("limit", range(14))
def test_the_largest_is_found(limit: int) -> None:
    """For every limit from none to more than all, with few tries."""
    tried: list[int] = []

    def holds(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = find_largest_fitting(SIZES, holds, lambda size: size <= limit)
    assert found == max((size for size in SIZES if size <= limit), default=None)
    assert len(tried) == len(set(tried)) <= 4


@pytest.mark.parametrize("fitting", [set(), {1}, {4}, {1, 2, 4}, {1, 2, 3, 4, 6}, {2, 6}])
def test_fragments_hide_no_larger_size(fitting: set[int]) -> None:
    """Where tensors of up to 6 have room, the largest that the allocator fits is found, whatever smaller ones do."""
    assert find_largest_fitting(SIZES, lambda size: size <= 6, fitting.__contains__) == max(fitting, default=None)


def test_sizes_are_those_that_a_process_can_have(workshop: Workshop) -> None:
    """Each number of micro-batches is one size; all in all they are never more than the global batch."""
    assert list_micro_batch_sizes(workshop.recipe(Full(), train={"global_batch_size": 12})) == SIZES
    assert list_micro_batch_sizes(workshop.recipe(Full(), train={"global_batch_size": 7})) == [1, 2, 3, 4, 7]


def test_every_set_once(workshop: Workshop) -> None:
    """No two that change the same knob, and none that changes nothing: of five, GELU is fused already."""
    sets = list_technique_sets(workshop.recipe(Full()), NAMES, UNKNOWN_DEVICE)
    assert sets[0] == ()
    names = {tuple(technique.name for technique in chosen) for chosen in sets}
    assert len(sets) == len(names) == 2 * (4 + 1)  # checkpointing or not, with bf16 x adamw8bit, or bf16_weights
    frozen = list_technique_sets(workshop.recipe(LastLayer()), ["checkpointing"], UNKNOWN_DEVICE)
    assert frozen == [()]
    other = workshop.recipe(Full(), optimizer=OPTIMIZERS["sgd"](kind="sgd"))
    assert list_technique_sets(other, ["adamw8bit"], UNKNOWN_DEVICE) == [()]
    without_bf16 = list_technique_sets(workshop.recipe(Full()), NAMES, get_device_facts("t4"))
    assert {technique.name for chosen in without_bf16 for technique in chosen} == {"checkpointing", "adamw8bit"}
    with pytest.raises(BudgetError, match="there is no technique 'bf61'; did you mean 'bf16'"):
        list_technique_sets(other, ["bf61"], UNKNOWN_DEVICE)


def test_a_technique_changes_its_knobs_alone(workshop: Workshop) -> None:
    """The rate and all else stay."""
    recipe = workshop.recipe(Full(), optimizer=OPTIMIZERS["adamw"](kind="adamw", learning_rate=3e-4))
    known = {technique.name: technique for technique in TECHNIQUES}
    made = known["bf16_weights"].apply(recipe)
    assert (made.optimizer.kind, made.optimizer.learning_rate) == ("adamw8bit_bf16", 3e-4)
    assert made.train.precision == "bf16"
    assert made.model_copy(update={"optimizer": recipe.optimizer, "train": recipe.train}) == recipe


def test_at_the_edge(workshop: Workshop) -> None:
    """At the bytes of the plan for 16 these are found and 32 do not fit; with one byte less not even 16."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 32}, evaluate={"batch_size": 1})
    budget = estimate(with_micro_batch(recipe, 16), UNKNOWN_DEVICE, "a GPU").process_bytes[1]
    found = find_strategy(recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", budget))
    assert found is not None
    assert (found.plan.micro_batch_size, found.plan.gradient_accumulation_steps, found.plan.verdict) == (16, 2, "fits")
    assert found.overrides == ("train.micro_batch_size=16",)
    assert estimate(with_micro_batch(recipe, 32), UNKNOWN_DEVICE, "a GPU", budget).verdict != "fits"
    less = find_strategy(recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", budget - 1))
    assert less is not None
    assert less.plan.micro_batch_size < 16
    assert (
        find_strategy(
            recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", found.plan.peak.live_bytes_by_category["weights"] + 1)
        )
        is None
    )


def test_time_is_of_flops_and_of_the_device(workshop: Workshop) -> None:
    """Checkpointing computes more; a device's bf16 is faster than its fp32; an unknown one has no seconds."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 4}, evaluate={"batch_size": 1})
    known = {technique.name: technique for technique in TECHNIQUES}
    facts = get_device_facts("h100")
    plain, again, half = (
        find_strategy(recipe, chosen, MemoryTarget(facts, "h100", 2**34))
        for chosen in ((), (known["checkpointing"],), (known["bf16"],))
    )
    assert plain is not None
    assert again is not None
    assert half is not None
    assert plain.step_seconds is not None
    assert again.step_seconds is not None
    assert half.step_seconds is not None
    assert 1.05 < again.step_seconds / plain.step_seconds < 1.5
    assert half.step_seconds < plain.step_seconds / 10
    unknown = find_strategy(recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", 2**34))
    assert unknown is not None
    assert unknown.step_seconds is None


def test_a_batch_of_evaluation_that_does_not_fit_is_halved(workshop: Workshop) -> None:
    """Where evaluation is what takes most, its batch goes down and training's does not; the changes say so."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 2}, evaluate={"batch_size": 64})
    whole = estimate(recipe, UNKNOWN_DEVICE, "a GPU")
    assert whole.peak_phase == "evaluate"
    half = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"batch_size": 32})})
    found = find_strategy(
        recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", estimate(half, UNKNOWN_DEVICE, "a GPU").process_bytes[1])
    )
    assert found is not None
    assert found.overrides == ("train.micro_batch_size=2", "evaluate.batch_size=32")
    assert apply_strategy(recipe, found).evaluate.batch_size == 32
