"""Building the components of a run from its recipe."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from transformers import Trainer

from peftbench.distributed.accelerator import build_accelerator
from peftbench.errors import EmptySplitError, OutOfRangeError, SequenceTooShortError
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.training.build import load_base_model
from peftbench.training.data import build_encoder, load_encoded_split, load_split
from tests.helpers.methods import every_method, one_method_fast
from tests.helpers.models import POSITIONS
from tests.helpers.training import build_adapted_model, build_training_components
from tests.helpers.workshop import Workshop


@one_method_fast("last_layer", "lora")
def test_gradient_checkpointing_is_enabled_unless_the_backbone_is_frozen(method: Method, workshop: Workshop) -> None:
    """The losses do not change. A frozen backbone has nothing to recompute."""
    losses = {}
    for enabled in (False, True):
        recipe = workshop.recipe(method, train={"gradient_checkpointing": enabled}, model={"dropout": 0.1})
        losses[enabled] = workshop.run(recipe).step_losses
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    built = build_adapted_model(recipe, build_accelerator(recipe, workshop.output).accelerator)
    assert built.base.model.is_gradient_checkpointing is not method.has_frozen_backbone


@every_method
def test_parameter_counts_match_the_closed_form(method: Method, workshop: Workshop) -> None:
    """Tied parameters are counted once, and trainable ones are those that require a gradient."""
    recipe = workshop.recipe(method)
    built = build_adapted_model(recipe, build_accelerator(recipe, workshop.output).accelerator)
    assert built.parameters.trainable == sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    # Token embedding, position embedding, two blocks of 12 h^2 + 13 h, final norm.
    assert built.parameters.total == 4096 * 64 + 64 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def test_subsample_is_seeded(workshop: Workshop) -> None:
    """It has the requested size and depends on the seed only."""
    first, same_seed, other_seed = (
        load_split(workshop.recipe(Full(), data={"train": 10, "seed": seed}), "train")["id"] for seed in (0, 0, 1)
    )
    assert len(set(first)) == 10
    assert first == same_seed
    assert first != other_seed


def test_subsample_larger_than_the_split_is_refused(workshop: Workshop) -> None:
    """The error has the number of examples in the split."""
    with pytest.raises(EmptySplitError, match=r"data\.train=25 .*the 24 examples"):
        load_split(workshop.recipe(Full(), data={"train": 25}), "train")


def test_virtual_tokens_reduce_the_allowed_max_length(workshop: Workshop) -> None:
    """A max_length that fits without virtual tokens is refused with them; the error has the largest that fits."""
    recipe = workshop.recipe(Full(), data={"max_length": POSITIONS})
    assert build_encoder(recipe, load_base_model(recipe)).layout.max_length == POSITIONS
    with pytest.raises(OutOfRangeError, match=f"set data.max_length={POSITIONS - 5} or less"):
        build_encoder(
            workshop.recipe(PromptTuning(num_virtual_tokens=5), data={"max_length": POSITIONS}), load_base_model(recipe)
        )


def test_max_length_without_room_for_an_article_is_refused(workshop: Workshop) -> None:
    """The check runs before training."""
    recipe = workshop.recipe(Full(), data={"max_length": 10}, evaluate={"max_new_tokens": 8})
    with pytest.raises(SequenceTooShortError):
        load_encoded_split(
            recipe,
            build_encoder(recipe, load_base_model(recipe)),
            "train",
            build_accelerator(recipe, workshop.output).accelerator,
        )


def test_padding_modes_give_the_expected_widths(workshop: Workshop) -> None:
    """With "max_length" the width is max_length; with "longest" it is the length of the longest row.

    With "free", and with "auto" here, the examples are packed into one row without padding.
    """
    for padding in ("max_length", "longest", "free", "auto"):
        recipe = workshop.recipe(Full(), data={"padding": padding})
        accelerator = build_accelerator(recipe, workshop.output).accelerator
        batch = next(iter(build_training_components(recipe, accelerator).batches))
        (part,) = batch.micro_batches
        assert len(part.lengths) == 6
        assert len(set(part.lengths)) > 1
        if padding in {"free", "auto"}:
            assert part.input_ids.shape == (1, sum(part.lengths))
            assert batch.token_counts.padded == batch.token_counts.real == sum(part.lengths)
        else:
            assert part.input_ids.shape == (6, 48 if padding == "max_length" else max(part.lengths))


def test_invalid_pad_to_multiple_of_is_refused(workshop: Workshop) -> None:
    """It must not exceed the model's positions, and must be 1 with label_padding."""
    recipe = workshop.recipe(Full(), data={"pad_to_multiple_of": POSITIONS + 1})
    with pytest.raises(OutOfRangeError, match=f"is more than the {POSITIONS} positions of the model; set {POSITIONS}"):
        build_training_components(recipe, build_accelerator(recipe, workshop.output).accelerator)
    with pytest.raises(ValidationError, match="pad_to_multiple_of changes the loss; leave it at 1"):
        workshop.recipe(Full(), data={"pad_to_multiple_of": 8, "label_padding": True})


@every_method
def test_six_n_matches_hf_trainer(method: Method, workshop: Workshop) -> None:
    """HF Trainer's estimate for the adapted model is 6 * N * tokens with the same N."""
    recipe = workshop.recipe(method)
    built = build_adapted_model(recipe, build_accelerator(recipe, workshop.output).accelerator)
    inputs = {"input_ids": torch.zeros(3, 7, dtype=torch.long)}
    trainer_flops = Trainer.floating_point_ops(SimpleNamespace(model=built.model), inputs)  # type: ignore[arg-type]
    assert 6 * built.six_n_parameters * 3 * 7 == trainer_flops > 0


@pytest.mark.parametrize("size", [25, 500, 10**9])
def test_batch_larger_than_the_data_is_refused(size: int, workshop: Workshop) -> None:
    """24 examples do not make a batch of 25, and a batch of 10**9 would grow without limit."""
    with pytest.raises(
        OutOfRangeError, match=f"global_batch_size={size} is more than the 24 training examples; set it"
    ):
        workshop.run(workshop.recipe(Lora(r=2), train={"global_batch_size": size}))


@pytest.mark.parametrize(("size", "repeats"), [(24, None), (25, 2), (72, 3)])
def test_repeats_within_a_step_are_allowed_and_noted(size: int, repeats: int | None, workshop: Workshop) -> None:
    """The recipe must allow them; the record has a note with the number of repeats."""
    train = {"global_batch_size": size, "micro_batch_size": 12, "steps": 1, "repeat_examples": True}
    record = workshop.run(workshop.recipe(Lora(r=2), train=train))
    expected = [] if repeats is None else [f"each step uses each of the 24 training examples up to {repeats} times"]
    assert list(record.notes) == expected
