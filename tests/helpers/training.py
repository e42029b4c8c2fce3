"""The objects that a run builds, for small models."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftbench.recipe.schema import Recipe
from tests.helpers.batches import LENGTHS_AND_PROMPTS, rows

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from peftbench.data.collate import MicroBatch
    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.modeling.loss import CausalLMLoss
    from peftbench.training.build import AdaptedModel, TrainingComponents


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """Return the base model that a method was applied to."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value,operator]


def loss_for(model: nn.Module, **options: Any) -> CausalLMLoss:
    """Return the loss function that a run uses for a model."""
    from peftbench.modeling.loss import build_loss

    return build_loss(base_model_of(model), **options)[0]


def summed_loss(model: nn.Module, batch: MicroBatch, **options: Any) -> torch.Tensor:
    """Return the loss of a micro-batch as a run computes it."""
    loss = loss_for(model, **options)
    with loss.attention_context():
        return loss(model, batch)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def wrap_model(model: nn.Module) -> AdaptedModel:
    """Return an adapted model with the fields that an evaluation needs."""
    from peftbench.record import ParameterCounts
    from peftbench.training.build import AdaptedModel

    base: Any = None
    return AdaptedModel(base, ParameterCounts(total=0, trainable=0), model, (), False, 0, loss_for(model))


def assemble_training(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> TrainingComponents:
    """Return the components of the training loop, with a constant learning rate and batches of ``rows``."""
    from datasets import Dataset
    from transformers import get_scheduler

    from peftbench.data.batches import Batches
    from peftbench.data.collate import Collator
    from peftbench.training.build import TrainingComponents

    batches = Batches(Dataset.from_list(rows(LENGTHS_AND_PROMPTS)), Collator(pad_token_id=0), 4, None, seed=0)
    schedule = get_scheduler("constant", optimizer)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    return TrainingComponents(prepared, loss_for(model), wrapped, schedule, batches, total_steps=1)


def single_process_context(accelerator: Accelerator) -> AcceleratorContext:
    """Return the context of a single process, in the accelerator's precision."""
    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.distributed.engines import SINGLE

    precision = str(accelerator.mixed_precision)
    return AcceleratorContext(accelerator, SINGLE, "fp32" if precision == "no" else precision)  # type: ignore[arg-type]


def build_adapted_model(recipe: Recipe, accelerator: Accelerator) -> AdaptedModel:
    """Return the adapted model that a run of ``recipe`` builds."""
    from peftbench.training.build import apply_method, load_base_model

    return apply_method(recipe, load_base_model(recipe), single_process_context(accelerator))


def build_training_components(
    recipe: Recipe, accelerator: Accelerator, built: AdaptedModel | None = None
) -> TrainingComponents:
    """Return the components of the training loop, with the recipe's training examples."""
    from peftbench.training.build import build_training
    from peftbench.training.data import build_encoder, load_encoded_split

    built = built or build_adapted_model(recipe, accelerator)
    encoder = build_encoder(recipe, built.base)
    examples = load_encoded_split(recipe, encoder, "train", accelerator).dataset
    return build_training(recipe, built, examples, encoder.eos_token_id, single_process_context(accelerator))


def reset_accelerators() -> None:
    """Reset accelerate's process-wide state, so that the next accelerator is independent."""
    if "accelerate" in sys.modules:  # do not import it for tests that do not use it
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
