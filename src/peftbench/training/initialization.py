"""Initial values that a method computes from training examples, before an engine prepares the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed

from peftbench.data.batches import Batches, EncodedExamples
from peftbench.data.collate import Collator, MicroBatch
from peftbench.errors import UnsupportedModelError
from peftbench.methods.initialization import InitializationPass, InitialValues
from peftbench.modeling.gguf_file import is_gguf_path
from peftbench.modeling.loading import load_config, resolve_model_path
from peftbench.modeling.run_base import find_run_base
from peftbench.modeling.weight_files import WEIGHTS_FILE
from peftbench.training.build import AdaptedModel, count_parameters
from peftbench.training.data import as_numpy

if TYPE_CHECKING:
    from torch import nn

    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.recipe.schema import Recipe


def compute_initial_values(
    recipe: Recipe,
    adapted_model: AdaptedModel,
    examples: EncodedExamples,
    context: AcceleratorContext,
    *,
    pad_token_id: int,
    on_batch: Callable[[MicroBatch], None],
) -> InitialValues:
    """Return the method's initial values; they depend only on the examples and on ``train.seed``.

    ``on_batch`` is called before each forward pass.

    Raises:
        OutOfRangeError, UnsupportedModelError: they cannot be computed.
    """
    loss, device = adapted_model.loss, context.accelerator.device
    batches = Batches(
        as_numpy(examples), Collator(pad_token_id), recipe.train.global_batch_size, None, recipe.train.seed
    )
    needs = recipe.method.initialization
    assert needs is not None
    chosen = list(itertools.islice(batches.sample_indices(), min(needs.examples, len(examples))))

    def collate(positions: Sequence[int]) -> MicroBatch:
        indices = [chosen[position] for position in positions]
        rows = batches.dataset[indices]
        return batches.collate(list(zip(rows["input_ids"], rows["label_spans"], indices, strict=True)))

    def compute_loss(batch: MicroBatch) -> torch.Tensor:
        on_batch(batch)
        with context.autocast(), loss.attention_context():
            return loss(adapted_model.model, batch.to(device))

    data = InitializationPass(len(chosen), collate, compute_loss, _find_weights_file(recipe) if needs.weights else None)
    set_seed(recipe.train.seed)
    return recipe.method.compute_initial_values(adapted_model.model, data)


def set_initial_values(recipe: Recipe, adapted_model: AdaptedModel, values: InitialValues) -> AdaptedModel:
    """Set the values in the model; return it with its new parameter counts."""
    before = _count_values(adapted_model.model)
    recipe.method.set_initial_values(adapted_model.model, values)
    trained, six_n_parameters = count_parameters(recipe, adapted_model.base, adapted_model.model)
    counts = adapted_model.parameters
    added_frozen = (
        (counts.added_frozen or 0) + _count_values(adapted_model.model) - before - (trained - counts.trainable)
    )
    parameters = counts.model_copy(update={"trainable": trained, "added_frozen": added_frozen})
    return replace(adapted_model, parameters=parameters, six_n_parameters=six_n_parameters)


def _count_values(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _find_weights_file(recipe: Recipe) -> Path:
    """Return the file of the weights before the run quantized them.

    Raises:
        UnsupportedModelError: there is none: the weights are stored quantized, or not in safetensors.
    """
    from transformers.utils.hub import cached_file

    path = resolve_model_path(recipe.model)
    file = None
    if not is_gguf_path(path) and getattr(load_config(recipe.model), "quantization_config", None) is None:
        run = find_run_base(recipe.model)
        path, revision = (path, recipe.model.revision) if run is None else (run.select_weights(recipe.model).path, None)
        folder = Path(path)
        file = folder if folder.is_dir() else Path(str(cached_file(path, "config.json", revision=revision))).parent
    if file is None:
        raise UnsupportedModelError(
            f"method.kind={recipe.method.kind} reads the weights before quantization, but {path} has none in "
            "safetensors; set model.path to an unquantized model in safetensors"
        )
    return file / WEIGHTS_FILE
