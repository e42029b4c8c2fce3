"""Seeds: a recipe is reproducible, and all methods train on the same examples in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from peftbench.distributed.accelerator import build_accelerator
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from tests.helpers.batches import list_tokens_and_labels
from tests.helpers.methods import ONE_OF_EACH, one_method_fast
from tests.helpers.training import build_training_components, reset_accelerators
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from peftbench.data.batches import GlobalBatch


@one_method_fast("lora")
def test_same_recipe_gives_bit_identical_losses(method: Method, workshop: Workshop) -> None:
    """Two runs with dropout have the same training losses and held-out loss."""
    recipe = workshop.recipe(method, model={"dropout": 0.1}, train={"steps": 4, "micro_batch_size": 4})
    first, second = workshop.run(recipe), workshop.run(recipe)
    assert first.step_losses == second.step_losses
    assert len(first.step_losses) == 4
    assert first.quality is not None
    assert second.quality is not None
    assert first.quality.loss == second.quality.loss


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (Full(), {"train": {"seed": 1}}),  # changes the order of examples
        pytest.param(LastLayer(), {"train": {"seed": 1}}, marks=pytest.mark.slow),
        (Lora(r=4), {"train": {"seed": 1}}),  # changes the initial weights
        pytest.param(PromptTuning(num_virtual_tokens=5), {"train": {"seed": 1}}, marks=pytest.mark.slow),
    ],
    ids=["full", "last_layer", "lora", "prompt_tuning"],
)
def test_training_seed_changes_the_losses(method: Method, change: dict[str, Any], workshop: Workshop) -> None:
    """For every method, the seed changes the order of examples or the initial weights."""
    plain = workshop.recipe(method, model=change.get("model"))
    first, second = workshop.run(plain), workshop.run(workshop.recipe(method, **change))
    assert first.step_losses != second.step_losses


def test_training_seed_changes_dropout(workshop: Workshop) -> None:
    """One step over all examples has the same loss for every seed, unless dropout is on."""

    def loss(dropout: float, seed: int) -> float:
        train = {"global_batch_size": 24, "steps": 1, "seed": seed}  # all examples
        return workshop.run(workshop.recipe(Full(), model={"dropout": dropout}, train=train)).step_losses[0]

    assert loss(0.0, 0) == pytest.approx(loss(0.0, 1), abs=1e-5)
    assert abs(loss(0.1, 0) - loss(0.1, 1)) > 1e-4


def test_data_seed_does_not_change_the_order(workshop: Workshop) -> None:
    """The data seed selects a subsample; if all examples are used, it has no effect."""
    first, second = (workshop.run(workshop.recipe(Full(), data={"seed": seed})) for seed in (0, 1))
    assert first.step_losses == second.step_losses


@pytest.mark.parametrize("padding", ["free", "longest"])
def test_order_is_the_same_for_every_method(padding: str, workshop: Workshop) -> None:
    """All methods get the same tokens and labels in the same order; methods only add virtual tokens."""
    batches_by_method: dict[str, list[GlobalBatch]] = {}
    for method in ONE_OF_EACH.values():
        reset_accelerators()
        recipe = workshop.recipe(method, data={"padding": padding}, train={"micro_batch_size": 4})
        accelerator = build_accelerator(recipe, workshop.output).accelerator
        batches = iter(build_training_components(recipe, accelerator).batches)
        batches_by_method[method.kind] = [next(batches) for _ in range(6)]  # more than one epoch
    reference = batches_by_method.pop("full")
    assert len(batches_by_method) == len(ONE_OF_EACH) - 1
    assert not torch.equal(reference[0].micro_batches[0].input_ids, reference[4].micro_batches[0].input_ids)
    for kind, batches_of_kind in batches_by_method.items():
        for theirs, ours in zip(reference, batches_of_kind, strict=True):
            for their_part, our_part in zip(theirs.micro_batches, ours.micro_batches, strict=True):
                assert list_tokens_and_labels(their_part, 0) == list_tokens_and_labels(
                    our_part, ONE_OF_EACH[kind].virtual_tokens
                )
                assert their_part.lengths == our_part.lengths
                assert their_part.example_indices == our_part.example_indices
            assert (theirs.token_counts.real, theirs.token_counts.padded, theirs.token_counts.labeled) == (
                ours.token_counts.real,
                ours.token_counts.padded,
                ours.token_counts.labeled,
            )
            assert (ours.token_counts.virtual > 0) == (kind == "prompt_tuning")
