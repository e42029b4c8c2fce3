"""The stages of a run other than training and saving: build, evaluate, gather. Each fills the run's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from peftbench.data.encode import count_marked
from peftbench.distributed.collectives import broadcast_from_main, main_process_first
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.metrics.selection import generates_text, select_metrics
from peftbench.evaluation.outputs import Output, Predictions, build_choice_scores, build_outputs, write_outputs
from peftbench.evaluation.scoring import add_scores, build_quality
from peftbench.profiler.peak_flops import measure_matmul_flops
from peftbench.run.evaluators import build_evaluator
from peftbench.run.forgetting import measure_loss_after
from peftbench.training.build import AdaptedModel, apply_method, build_training, check_generation
from peftbench.training.data import (
    INTERVAL_SPLIT,
    explain_interval_split,
    load_encoded_split,
    load_split,
    read_targets,
)
from peftbench.training.loop import DivergedError
from peftbench.training.overlap import find_overlap

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.batches import EncodedExamples
    from peftbench.data.encode import Encoder
    from peftbench.evaluation.evaluator import Evaluator
    from peftbench.modeling.loading import LoadedModel
    from peftbench.run.state import RunState
    from peftbench.training.build import TrainingComponents


def load_examples(state: RunState, encoder: Encoder, split: str) -> Dataset:
    """Return the encoded examples of a split."""
    encoded = load_encoded_split(state.recipe, encoder, split, state.accelerator)
    state.set_example_counts(split, len(encoded.dataset), encoded.num_dropped)
    state.num_cut[split] = count_marked(encoded.dataset, "cut_tokens")
    state.num_cut_labels[split] = sum(encoded.dataset["cut_labels"])
    state.num_with_control_tokens[split] = count_marked(encoded.dataset, "control_tokens")
    return encoded.dataset


def build_interval_evaluator(
    state: RunState,
    adapted_model: AdaptedModel,
    encoder: Encoder,
    held_out: Dataset,
    is_oom: Callable[[BaseException], bool],
) -> Evaluator | None:
    """Return the evaluator of the validation split during training, None without ``evaluate.interval``.

    ``held_out`` are the examples that are evaluated after the training.

    Raises:
        EmptySplitError: the source has no validation split.
    """
    config = state.recipe.evaluate
    if config.interval is None:
        return None
    if config.split == INTERVAL_SPLIT:
        examples = held_out
        if state.recipe.selects_by_held_out_loss:
            state.notes.append(
                f"the evaluated {INTERVAL_SPLIT} split has also selected the saved weights, so its result is optimistic"
            )
    else:
        with explain_interval_split():
            examples = load_examples(state, encoder, INTERVAL_SPLIT)
    return build_evaluator(state, adapted_model, encoder, examples, is_oom)


def compare_splits(state: RunState, train: Dataset, evaluated: Dataset) -> None:
    """Count the evaluated examples that are also training examples. Collective."""
    source, split, task = state.recipe.data.source, state.recipe.evaluate.split, state.recipe.task
    state.split_overlap = broadcast_from_main(
        state.accelerator,
        lambda: find_overlap(
            train,
            evaluated,
            task,
            has_ids=source.has_ids,
            is_same_file=source.is_same_file("train", split),
        ),
    )


def adapt_model(state: RunState, base_model: LoadedModel) -> AdaptedModel:
    """Apply the recipe's method to the base model."""
    generation_notes = check_generation(state.recipe, base_model) if generates_text(state.recipe) else []
    adapted_model = state.adapted_model = apply_method(state.recipe, base_model, state.context)
    state.notes += [*generation_notes, *adapted_model.notes]
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


def evaluate_model(
    state: RunState,
    adapted_model: AdaptedModel,
    encoder: Encoder,
    examples: Dataset,
    is_oom: Callable[[BaseException], bool],
) -> None:
    """Evaluate the model on held-out examples. Each result is kept as soon as it is known, whatever happens later.

    Raises:
        DivergedError: the held-out loss is not finite.
    """
    config, probe = state.recipe.evaluate, state.probe
    evaluator = build_evaluator(state, adapted_model, encoder, examples, is_oom)
    needs = {metric.needs for metric in select_metrics(state.recipe)}
    predictions = Predictions()
    try:
        with probe.phase("evaluate"):
            held_out = evaluator.compute_held_out_loss()
            state.quality = build_quality(state.recipe, examples, (), held_out=held_out)
            if not math.isfinite(held_out.loss):
                step = state.get_trained_steps()
                raise DivergedError(step, f"the held-out loss after step {step} is {held_out.loss}")
            measure_loss_after(state, adapted_model, encoder, is_oom)
            if config.teacher_forced:
                predictions = replace(predictions, teacher_forced=evaluator.decode_teacher_forced())
            if "choices" in needs:
                predictions = replace(predictions, choices=evaluator.score_choices())
        if "generated" in needs:
            with probe.phase("generate"):
                predictions = replace(predictions, generated=evaluator.generate())
    finally:
        state.notes += evaluator.notes
    outputs = build_outputs(examples, state.recipe.task, predictions)
    state.quality = build_quality(state.recipe, examples, outputs, held_out=held_out)
    if needs:
        score_outputs(state, outputs)


def evaluate_without_model(state: RunState) -> None:
    """Evaluate a baseline that needs no model."""
    recipe, task = state.recipe, state.recipe.task
    split = recipe.evaluate.split
    dataset = main_process_first(state.accelerator, lambda: load_split(recipe, split))
    state.set_example_counts(split, len(dataset), 0)
    predict = recipe.method.build_predictor(
        lambda: read_targets(main_process_first(state.accelerator, lambda: load_split(recipe, "train")), task)
    )
    has_choices = task.evaluation == "choices"
    examples = [(task.get_prompt(row), task.get_choices(row)[0] if has_choices else ()) for row in dataset]
    targets = [predict(prompt, choices) for prompt, choices in examples]
    choices = [build_choice_scores(one, target.choice) for (_, one), target in zip(examples, targets, strict=True)]
    predictions = Predictions(choices=choices) if has_choices else Predictions([target.text for target in targets])
    outputs = build_outputs(dataset, task, predictions)
    state.quality = build_quality(recipe, dataset, outputs)
    score_outputs(state, outputs)


def score_outputs(state: RunState, outputs: Sequence[Output]) -> None:
    """Save the generated texts of all examples in the run's folder, then compute their metrics.

    Raises:
        OutputError: they cannot be written.
    """
    assert state.quality is not None
    if state.accelerator.is_main_process:
        write_outputs(state.run_dir.path, outputs)
    state.has_outputs = True
    state.quality = add_scores(state.recipe, state.quality, outputs)


def measure_training(state: RunState) -> None:
    """Measure the device's matmul speed, and gather all ranks' measurements of the training. Collective."""
    state.matmul_flops = measure_matmul_flops(state.accelerator.device, state.recipe.train.resolved_precision)
    state.gather_rank_measurements()
