"""The search returns the largest micro-batch, and tries each set of techniques once."""

from __future__ import annotations

from typing import Any

import pytest

from peftbench.errors import BudgetError
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts
from peftbench.memory.estimate import estimate
from peftbench.memory.plan import Plan, Strategy, sort_fastest_first
from peftbench.memory.search import (
    TECHNIQUES,
    MemoryTarget,
    apply_strategy,
    find_largest_fitting,
    find_strategy,
    list_micro_batch_sizes,
    list_technique_sets,
    with_micro_batch,
    with_techniques,
)
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.optim import OPTIMIZERS
from tests.helpers.workshop import Workshop

NAMES = [technique.name for technique in TECHNIQUES]


SIZES = [1, 2, 3, 4, 6, 12]


def test_largest_fitting_size_is_found() -> None:
    """For every limit, the search tests at most four sizes."""
    for limit in range(14):
        tried: list[int] = []

        def has_capacity(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        largest = find_largest_fitting(SIZES, has_capacity, limit.__ge__)
        assert largest == max((size for size in SIZES if size <= limit), default=None)
        assert len(tried) == len(set(tried)) <= 4


@pytest.mark.parametrize("fitting", [set(), {1}, {4}, {1, 2, 4}, {1, 2, 3, 4, 6}, {2, 6}])
def test_fragmented_sizes_are_skipped(fitting: set[int]) -> None:
    """The largest size that the allocator fits is found, even if smaller sizes do not fit."""
    assert find_largest_fitting(SIZES, lambda size: size <= 6, fitting.__contains__) == max(fitting, default=None)


def test_micro_batch_sizes_of_a_global_batch(workshop: Workshop) -> None:
    """There is one size per number of micro-batches."""
    assert list_micro_batch_sizes(workshop.recipe(Full(), train={"global_batch_size": 12})) == SIZES
    assert list_micro_batch_sizes(workshop.recipe(Full(), train={"global_batch_size": 7})) == [1, 2, 3, 4, 7]


def test_technique_sets_of_a_recipe(workshop: Workshop) -> None:
    """No two techniques of a set change the same key, and each changes the recipe (GELU is already fused)."""
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
    with pytest.raises(BudgetError, match="Unknown technique 'bf61'; did you mean 'bf16'"):
        list_technique_sets(other, ["bf61"], UNKNOWN_DEVICE)


def test_optimizer_techniques_come_from_low_memory_variants() -> None:
    """Each low-memory variant of an optimizer has one technique, and all names are unique."""
    kinds = [technique.overrides["optimizer"]["kind"] for technique in TECHNIQUES if "optimizer" in technique.overrides]
    variants = {kind for optimizer in OPTIMIZERS.values() for kind in optimizer.low_memory_variants}
    assert sorted(kinds) == sorted(variants)
    assert len(set(NAMES)) == len(NAMES)


def test_technique_changes_only_its_keys(workshop: Workshop) -> None:
    """The learning rate and all other keys are unchanged."""
    recipe = workshop.recipe(Full(), optimizer=OPTIMIZERS["adamw"](kind="adamw", learning_rate=3e-4))
    known = {technique.name: technique for technique in TECHNIQUES}
    changed = known["bf16_weights"].apply(recipe)
    assert (changed.optimizer.kind, changed.optimizer.learning_rate) == ("adamw8bit_bf16", 3e-4)
    assert changed.train.precision == "bf16"
    assert changed.model_copy(update={"optimizer": recipe.optimizer, "train": recipe.train}) == recipe


def test_fit_changes_at_the_planned_bytes(workshop: Workshop) -> None:
    """With the planned bytes of micro-batch 16, 16 fits and 32 does not; with one byte less, 16 does not fit."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 32}, evaluate={"batch_size": 1})
    budget = estimate(with_micro_batch(recipe, 16), UNKNOWN_DEVICE, "a GPU").process_bytes[1]
    fitting = find_strategy(recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", budget))
    assert fitting is not None
    assert (fitting.plan.micro_batch_size, fitting.plan.gradient_accumulation_steps, fitting.plan.verdict) == (
        16,
        2,
        "fits",
    )
    assert fitting.overrides == ("train.micro_batch_size=16",)
    assert estimate(with_micro_batch(recipe, 32), UNKNOWN_DEVICE, "a GPU", budget).verdict != "fits"
    smaller = find_strategy(recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", budget - 1))
    assert smaller is not None
    assert smaller.plan.micro_batch_size < 16
    assert (
        find_strategy(
            recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", fitting.plan.peak.live_bytes_by_category["weights"] + 1)
        )
        is None
    )


def test_step_seconds_by_technique(workshop: Workshop) -> None:
    """Checkpointing is slower, products in bf16 are faster than in fp32, an unknown device has no seconds."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 4}, evaluate={"batch_size": 1})
    known = {technique.name: technique for technique in TECHNIQUES}
    facts = get_device_facts("h100")
    plain, checkpointed, in_bf16 = (
        find_strategy(recipe, chosen, MemoryTarget(facts, "h100", 2**34))
        for chosen in ((), (known["checkpointing"],), (known["bf16"],))
    )
    assert plain is not None
    assert checkpointed is not None
    assert in_bf16 is not None
    assert plain.step_seconds is not None
    assert checkpointed.step_seconds is not None
    assert plain.plan.step_time is not None
    assert in_bf16.plan.step_time is not None
    assert 1.05 < checkpointed.step_seconds / plain.step_seconds < 2
    fp32, bf16 = (time.seconds_by_kind["product"][0] for time in (plain.plan.step_time, in_bf16.plan.step_time))
    assert bf16 < fp32 / 1.5
    unknown = find_strategy(recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", 2**34))
    assert unknown is not None
    assert unknown.step_seconds is None


def test_evaluation_batch_is_halved(workshop: Workshop) -> None:
    """If evaluation needs the most memory, its batch size is reduced, and the overrides show it."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 2}, evaluate={"batch_size": 64})
    whole = estimate(recipe, UNKNOWN_DEVICE, "a GPU")
    assert whole.peak_phase == "evaluate"
    half = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"batch_size": 32})})
    fitting = find_strategy(
        recipe, (), MemoryTarget(UNKNOWN_DEVICE, "a GPU", estimate(half, UNKNOWN_DEVICE, "a GPU").process_bytes[1])
    )
    assert fitting is not None
    assert fitting.overrides == ("train.micro_batch_size=2", "evaluate.batch_size=32")
    assert apply_strategy(recipe, fitting).evaluate.batch_size == 32


def test_of_equally_fast_strategies_the_smallest_change_of_arithmetic_comes_first() -> None:
    """The largest change counts before the number of changes, and both before the micro-batch size."""
    ranks = {technique.name: technique.numerics_change for technique in TECHNIQUES}
    assert [ranks[name] for name in ("checkpointing", "fused_gelu", "bf16", "adamw8bit", "bf16_weights")] == [
        *(0, 1, 2, 2, 3)
    ]
    order = [
        ("checkpointing",),
        ("fused_gelu",),
        ("adamw8bit",),
        ("checkpointing", "bf16"),
        ("fused_gelu", "bf16"),
        ("bf16", "adamw8bit"),
        ("bf16_weights",),
    ]
    strategies = []
    for place, names in enumerate(order):
        plan: dict[str, Any] = {"micro_batch_size": place, "step_flops": 1}
        changes = tuple(sorted((ranks[name] for name in names), reverse=True))
        fields: dict[str, Any] = {"techniques": names, "numerics_changes": changes, "step_seconds": 1.0}
        strategies.append(Strategy.model_construct(**fields, plan=Plan.model_construct(**plan)))
    assert (
        [strategy.techniques for strategy in sort_fastest_first(reversed(strategies))]
        == [
            *order[:2],
            *(order[3], order[2]),  # equal changes: the larger micro-batch
            *order[4:],
        ]
    )
    slow = strategies[0].model_copy(update={"step_seconds": 2.0})
    assert sort_fastest_first([slow, strategies[-1]])[0] is strategies[-1]


def test_bf16_technique_holds_frozen_weights_in_bf16(workshop: Workshop) -> None:
    """model.dtype=auto follows the precision that a technique sets; a type that was given stays."""
    target = MemoryTarget(UNKNOWN_DEVICE, "a GPU", None)
    technique = next(technique for technique in TECHNIQUES if technique.name == "bf16")
    for dtype, expected in (("auto", "bf16"), ("fp32", "fp32")):
        resolved, _ = target.resolve(workshop.recipe(Lora(r=2), model={"dtype": dtype}))
        assert resolved.frozen_dtype == "fp32"
        assert with_techniques(resolved, [technique]).frozen_dtype == expected
