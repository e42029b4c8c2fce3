"""The cheapest change that fits a budget, the lower bound that rules out sets of techniques, and ``--check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftbench.errors import BudgetError, DoesNotFitError
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts
from peftbench.memory.launch_config import SINGLE_PROCESS
from peftbench.memory.lower_bound import compute_lower_bound, measure_tensors
from peftbench.memory.plan import UnplannedRun
from peftbench.memory.search import MemoryTarget, check_verdicts
from peftbench.memory.suggestion import (
    _compute_evaluation_bytes,
    _iter_variants,
    find_cheapest_change,
    suggest_change,
    suggest_evaluation,
)
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.arguments import load_recipe_from_arguments
from peftbench.recipe.loader import to_commented_yaml
from peftbench.recipe.schema import Recipe
from tests.helpers.workshop import Workshop

TRAIN = {"global_batch_size": 8, "micro_batch_size": 8}
PARAMETERS = 4096 * 64 + 64 * 64 + 2 * (2 * 128 + 64 * 192 + 192 + 64 * 64 + 64 + 64 * 256 + 256 + 256 * 64 + 64) + 128
"""Parameters of the small GPT-2 with a tied head."""


def fit_exactly(recipe: Recipe) -> MemoryTarget:
    """Return a CPU target with the budget that the recipe just fits."""
    plan = MemoryTarget(get_device_facts("cpu"), "cpu", None).plan(recipe)
    return MemoryTarget(get_device_facts("cpu"), "cpu", plan.process_bytes[1])


@pytest.mark.parametrize("method", [Full(), Lora(r=2)])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "adamw8bit"])
def test_lower_bound_is_the_bytes_of_weights_gradients_and_states(
    method: Method, kind: str, workshop: Workshop
) -> None:
    """It is exact by closed form, and no plan is below it."""
    optimizer = OPTIMIZERS[kind]()  # type: ignore[call-arg]
    recipe = workshop.recipe(method, optimizer=optimizer, train=TRAIN)
    sizes = measure_tensors(recipe)
    trained = PARAMETERS if method.kind == "full" else 2 * sum((64 + 192, 64 + 64, 64 + 256, 256 + 64)) * 2
    assert sizes.trained_bytes == 4 * trained
    assert sizes.weight_bytes == 4 * (PARAMETERS + (trained if method.kind == "lora" else 0))
    if kind == "sgd":
        assert sizes.state_bytes == 0
    plan = MemoryTarget(UNKNOWN_DEVICE, "a GPU", None).plan(recipe)
    assert sizes.weight_bytes + sizes.trained_bytes + sizes.state_bytes <= plan.peak.allocated_bytes
    assert compute_lower_bound(recipe, SINGLE_PROCESS) == (sizes.weight_bytes + sizes.trained_bytes + sizes.state_bytes)


def test_lower_bound_counts_frozen_weights_in_their_type(workshop: Workshop) -> None:
    """Two bytes a frozen weight and four a trained one, where only train.precision differs."""
    trained = 2 * sum((64 + 192, 64 + 64, 64 + 256, 256 + 64)) * 2
    for precision, size in (("fp32", 4), ("bf16", 2)):
        recipe = workshop.recipe(Lora(r=2), train=TRAIN | {"precision": precision})
        assert measure_tensors(recipe).weight_bytes == size * PARAMETERS + 4 * trained


def test_lora_that_replaces_full_fine_tuning_is_planned_in_16_bits(workshop: Workshop) -> None:
    """A run of full fine-tuning has resolved model.dtype to fp32, and the recipe that is suggested has not."""
    recipe = workshop.recipe(Full(), train=TRAIN | {"precision": "bf16"}).with_resolved_dtype()
    assert recipe.model.dtype == "fp32"
    variants = {overrides: variant for overrides, _, variant in _iter_variants(recipe)}
    assert variants["method.kind=lora",].frozen_dtype == "bf16"


def test_smaller_micro_batch_is_the_cheapest_change(workshop: Workshop) -> None:
    """A budget that a micro-batch of 2 fits is met without any technique, by halving."""
    recipe = workshop.recipe(Full(), train=TRAIN, evaluate={"batch_size": 1})
    small = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": 2})})
    strategy = find_cheapest_change(recipe, fit_exactly(small))
    assert strategy is not None
    assert strategy.techniques == ()
    assert strategy.overrides == ("train.micro_batch_size=2",)


@pytest.mark.parametrize("kind", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_lora_is_suggested_if_no_technique_of_full_fine_tuning_fits(kind: str, workshop: Workshop) -> None:
    """The suggestion is predicted to fit, and the trade-off names the other method.

    AdamW has many variants that save memory, so that the search takes longer.
    """
    optimizer = OPTIMIZERS[kind]()  # type: ignore[call-arg]
    recipe = workshop.recipe(Full(), optimizer=optimizer, train=TRAIN, evaluate={"batch_size": 1})
    lora = recipe.model_copy(update={"method": Lora()})
    target = fit_exactly(lora.model_copy(update={"train": lora.train.model_copy(update={"micro_batch_size": 1})}))
    sentence = suggest_change(recipe, target).sentence
    assert sentence.startswith("with method.kind=lora ")
    assert "the run is predicted to fit and to need at most" in sentence
    assert "another method, whose learning rate must be chosen" in sentence


def test_suggested_overrides_fit(workshop: Workshop, tmp_path: Path) -> None:
    """A plan of the recipe with the suggested overrides, given on the command line, fits."""
    recipe = workshop.recipe(Full(), train=TRAIN)
    target = fit_exactly(recipe.model_copy(update={"method": Lora()}))
    strategy = find_cheapest_change(recipe, target)
    assert strategy is not None
    path = tmp_path / "recipe.yaml"
    path.write_text(to_commented_yaml(recipe), encoding="utf-8")
    changed = load_recipe_from_arguments("estimate", [str(path), *strategy.overrides], [])
    assert target.plan(changed).verdict == "fits"


def test_unchanged_micro_batch_is_not_suggested(workshop: Workshop) -> None:
    """A budget that only gradient checkpointing meets names that key alone, not a micro-batch that is the same."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 8, "micro_batch_size": 1}, evaluate={"batch_size": 1})
    plan = MemoryTarget(get_device_facts("cpu"), "cpu", None).plan(recipe)
    target = MemoryTarget(get_device_facts("cpu"), "cpu", plan.process_bytes[1] - 1)
    suggestion = suggest_change(recipe, target)
    assert suggestion.overrides
    assert not any(override.startswith("train.micro_batch_size") for override in suggestion.overrides)
    assert suggestion.sentence.startswith(f"with {' '.join(suggestion.overrides)} the run is predicted to fit")


@pytest.mark.parametrize(
    ("smaller", "overrides"),
    [
        pytest.param({"batch_size": 1}, ("evaluate.batch_size=1",), marks=pytest.mark.slow),
        ({"batch_size": 1, "num_beams": 1}, ("evaluate.batch_size=1", "evaluate.num_beams=1")),
        (None, ("evaluate.metrics=[]",)),
    ],
)
def test_suggestion_for_an_evaluation_changes_only_the_evaluation(
    smaller: dict[str, Any] | None, overrides: tuple[str, ...], workshop: Workshop
) -> None:
    """A trained model is evaluated with a smaller batch, fewer beams or no generation, without another training."""
    evaluate = {"metrics": None, "batch_size": 8, "num_beams": 64}
    recipe = workshop.recipe(Lora(r=2), train=TRAIN, evaluate=evaluate)
    budget = 2**20
    if smaller is not None:
        fitting = workshop.recipe(Lora(r=2), train={"micro_batch_size": 1}, evaluate={**evaluate, **smaller})
        budget = _compute_evaluation_bytes(MemoryTarget(get_device_facts("cpu"), "cpu", None).plan(fitting))
    suggestion = suggest_evaluation(recipe, MemoryTarget(get_device_facts("cpu"), "cpu", budget))
    assert suggestion.overrides == overrides


def test_hopeless_budget_names_the_bytes_of_the_states(workshop: Workshop) -> None:
    """Nothing fits 1 MiB; the sentence has the recipe's own lower bound."""
    recipe = workshop.recipe(Full(), train=TRAIN)
    sentence = suggest_change(recipe, MemoryTarget(get_device_facts("cpu"), "cpu", 2**20)).sentence
    assert sentence.startswith(
        "smaller micro-batches, memory techniques, method.kind=lora and model.quantization=nf4 were tried, and none is "
        "predicted to fit; weights, "
    )
    assert f"take at least {16 * PARAMETERS / 2**20:,.0f} MiB" in sentence


def test_check_accepts_only_plans_that_fit(workshop: Workshop) -> None:
    """A run without an estimate or without a budget is refused too."""
    recipe = workshop.recipe(Full(), train=TRAIN)
    facts = get_device_facts("cpu")
    check_verdicts([MemoryTarget(facts, "cpu", 2**31).plan(recipe)])
    with pytest.raises(DoesNotFitError, match="run in 1 MiB: does not fit; it needs"):
        check_verdicts([MemoryTarget(facts, "cpu", 2**20).plan(recipe)])
    with pytest.raises(BudgetError, match="--check needs a budget"):
        check_verdicts([MemoryTarget(facts, "cpu", None).plan(recipe)])
    with pytest.raises(DoesNotFitError, match="run has no estimate: because"):
        check_verdicts([UnplannedRun(name="run", reason="because")])
