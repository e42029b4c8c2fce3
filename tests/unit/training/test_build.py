"""From a recipe to what is run."""

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
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.training.build import load_base_model
from peftbench.training.data import build_encoder, load_encoded_split, load_split
from tests.helpers.methods import every_method
from tests.helpers.models import POSITIONS
from tests.helpers.training import built_from, trainer_from
from tests.helpers.workshop import Workshop


@every_method
def test_checkpointing_where_there_is_something_to_recompute(method: Method, workshop: Workshop) -> None:
    """The recipe's switch turns checkpointing on, but for a frozen trunk, which it would only cost; losses agree."""
    losses = {}
    for switch in (False, True):
        recipe = workshop.recipe(method, train={"gradient_checkpointing": switch}, model={"dropout": 0.1})
        losses[switch] = workshop.run(recipe).step_losses
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    built = built_from(recipe, build_accelerator(recipe, workshop.output).accelerator)
    assert built.base.model.is_gradient_checkpointing is not method.has_frozen_backbone


@every_method
def test_parameters_of_the_record(method: Method, workshop: Workshop) -> None:
    """The record counts the base's scalars once, tied ones too, and the trained ones by the closed form."""
    recipe = workshop.recipe(method)
    built = built_from(recipe, build_accelerator(recipe, workshop.output).accelerator)
    assert built.parameters.trainable == sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    # Embedding, positions, two blocks of 12 h^2 + 13 h, the last norm.
    assert built.parameters.total == 4096 * 64 + 64 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def test_subsample_is_seeded(workshop: Workshop) -> None:
    """A subsample has the size asked for, is the same for the same seed, and another for another."""
    first, again, other = (
        load_split(workshop.recipe(Full(), data={"train": 10, "seed": seed}), "train")["id"] for seed in (0, 0, 1)
    )
    assert len(set(first)) == 10
    assert first == again
    assert first != other


def test_more_examples_than_there_are(workshop: Workshop) -> None:
    """Asking for more examples than a split has is refused with their number."""
    with pytest.raises(EmptySplitError, match=r"data\.train=25 .*the 24 examples"):
        load_split(workshop.recipe(Full(), data={"train": 25}), "train")


def test_virtual_tokens_take_positions(workshop: Workshop) -> None:
    """A recipe that fits the model without virtual tokens is refused with them, and says what would fit."""
    fits = workshop.recipe(Full(), data={"max_length": POSITIONS})
    assert build_encoder(fits, load_base_model(fits)).layout.max_length == POSITIONS
    with pytest.raises(OutOfRangeError, match=f"set data.max_length={POSITIONS - 5} or less"):
        build_encoder(
            workshop.recipe(PromptTuning(num_virtual_tokens=5), data={"max_length": POSITIONS}), load_base_model(fits)
        )


def test_no_room_for_an_article(workshop: Workshop) -> None:
    """A limit that leaves no room for an article is refused before anything is trained."""
    recipe = workshop.recipe(Full(), data={"max_length": 10}, evaluate={"max_new_tokens": 8})
    with pytest.raises(SequenceTooShortError):
        load_encoded_split(
            recipe,
            build_encoder(recipe, load_base_model(recipe)),
            "train",
            build_accelerator(recipe, workshop.output).accelerator,
        )


def test_padding_to_a_fixed_width(workshop: Workshop) -> None:
    """Padded to max_tokens, every micro-batch has that width; padded to the longest, none is wider than it must be.

    Without padding all its examples share one row that holds nothing else; that is what is done where nothing is said.
    """
    for padding in ("max_length", "longest", "free", "auto"):
        recipe = workshop.recipe(Full(), data={"padding": padding})
        accelerator = build_accelerator(recipe, workshop.output).accelerator
        batch = next(iter(trainer_from(recipe, accelerator).batches))
        (part,) = batch.micro_batches
        assert len(part.lengths) == 6
        assert len(set(part.lengths)) > 1
        if padding in {"free", "auto"}:
            assert part.input_ids.shape == (1, sum(part.lengths))
            assert batch.token_counts.padded == batch.token_counts.real == sum(part.lengths)
        else:
            assert part.input_ids.shape == (6, 48 if padding == "max_length" else max(part.lengths))


def test_rows_are_padded_to_a_multiple(workshop: Workshop) -> None:
    """Rows cannot be padded beyond the model's positions."""
    recipe = workshop.recipe(Full(), data={"pad_to_multiple_of": POSITIONS + 1})
    with pytest.raises(OutOfRangeError, match=f"is more than the {POSITIONS} positions of the model; set {POSITIONS}"):
        trainer_from(recipe, build_accelerator(recipe, workshop.output).accelerator)
    with pytest.raises(ValidationError, match="pad_to_multiple_of changes the loss; leave it at 1"):
        workshop.recipe(Full(), data={"pad_to_multiple_of": 8, "label_padding": True})


@every_method
def test_six_n_is_what_hf_trainer_reports(method: Method, workshop: Workshop) -> None:
    """The very figure that HF Trainer gives for the model as the method left it."""
    recipe = workshop.recipe(method)
    built = built_from(recipe, build_accelerator(recipe, workshop.output).accelerator)
    inputs = {"input_ids": torch.zeros(3, 7, dtype=torch.long)}
    by_trainer = Trainer.floating_point_ops(SimpleNamespace(model=built.model), inputs)  # type: ignore[arg-type]
    assert 6 * built.six_n_parameters * 3 * 7 == by_trainer > 0
