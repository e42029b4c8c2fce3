"""The stages of a run other than training: load, build, evaluate, gather, save. Each fills the run's state."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from peftbench.common.filesystem import as_os_error, write_error
from peftbench.distributed.collectives import main_process_first
from peftbench.distributed.sharding import gather_full_model
from peftbench.evaluation.evaluator import Evaluator, build_quality
from peftbench.profiler.peak_flops import measure_matmul_flops
from peftbench.training.build import AdaptedModel, apply_method, build_training
from peftbench.training.data import load_encoded_split, load_split
from peftbench.training.loop import DivergedError

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.batches import EncodedExamples
    from peftbench.data.encode import Encoder
    from peftbench.modeling.loading import LoadedModel
    from peftbench.run.state import RunState
    from peftbench.training.build import TrainingComponents


def load_examples(state: RunState, encoder: Encoder, split: str) -> Dataset:
    """Return the encoded examples of a split."""
    encoded = load_encoded_split(state.recipe, encoder, split, state.accelerator)
    state.set_example_counts(split, len(encoded.dataset), encoded.num_dropped)
    return encoded.dataset


def adapt_model(state: RunState, base_model: LoadedModel) -> AdaptedModel:
    """Apply the recipe's method to the base model."""
    adapted_model = state.adapted_model = apply_method(state.recipe, base_model, state.context)
    state.notes += adapted_model.notes
    return adapted_model


def build_training_components(
    state: RunState, adapted_model: AdaptedModel, examples: EncodedExamples, pad_token_id: int
) -> TrainingComponents:
    """Build optimizer, schedule, batches and loss, and prepare them for the engine."""
    training = state.training = build_training(state.recipe, adapted_model, examples, pad_token_id, state.context)
    state.notes += training.notes
    if training.flops_unknown_reason:
        state.notes.append(training.flops_unknown_reason)
    return training


def evaluate_model(state: RunState, adapted_model: AdaptedModel, encoder: Encoder, examples: Dataset) -> None:
    """Evaluate the model on held-out examples.

    Raises:
        DivergedError: the held-out loss is not finite.
    """
    is_sharded = state.engine.shards_weights and state.recipe.method.is_trainable
    evaluator = Evaluator(state.context, adapted_model, encoder, examples, state.recipe, synced=is_sharded)
    state.quality = evaluator.evaluate(state.probe)
    if not math.isfinite(state.quality.loss or 0.0):
        step = state.progress.completed_steps
        raise DivergedError(step, f"the held-out loss after step {step} is {state.quality.loss}")


def evaluate_extractive_baseline(state: RunState) -> None:
    """Evaluate a baseline that copies its summary from the article and needs no model."""
    split = state.recipe.evaluate.split
    dataset = main_process_first(state.accelerator, lambda: load_split(state.recipe, split))
    state.set_example_counts(split, len(dataset), 0)
    summaries = [state.recipe.method.extract_summary(article) or "" for article in dataset["article"]]
    state.quality = build_quality(state.recipe.evaluate, dataset, summaries)


def gather_measurements(state: RunState) -> None:
    """Measure the device's matmul speed if the run trained, and gather all ranks' measurements. Collective."""
    matmul_flops = None
    if state.recipe.method.is_trainable:
        matmul_flops = measure_matmul_flops(state.accelerator.device, state.recipe.train.resolved_precision)
    state.rank_measurements = state.gather_rank_measurements(matmul_flops)


def save_model(state: RunState, adapted_model: AdaptedModel) -> None:
    """Save the trained model and its tokenizer: complete or, after an error, not at all. Collective.

    Raises:
        OutputError: it cannot be written.
    """
    assert state.training is not None
    is_main = state.accelerator.is_main_process
    gather_full_model(state.engine, state.training.model, adapted_model.model, on_this_rank=is_main)
    if not is_main:
        return
    model_dir, partial_dir = state.run_dir.model_dir, state.run_dir.partial_model_dir
    try:
        shutil.rmtree(partial_dir, ignore_errors=True)  # of a run that was killed
        state.recipe.method.save(adapted_model.model, partial_dir)
        adapted_model.base.tokenizer.save_pretrained(partial_dir)
        partial_dir.rename(model_dir)
    except BaseException as error:  # after an interrupt too, no partial model is left
        shutil.rmtree(partial_dir, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise write_error(model_dir, as_os_error(error)) from error
        raise


def delete_saved_model(state: RunState) -> None:
    """Delete the model of an earlier run in this folder, which the new record would not describe."""
    if state.accelerator.is_main_process:
        shutil.rmtree(state.run_dir.model_dir, ignore_errors=True)
