"""Build the record of a run from its state and its outcome."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from peftbench.distributed.accelerator import describe_device
from peftbench.distributed.deepspeed import unwrap_optimizer
from peftbench.evaluation.evaluator import HALVED_BATCH_NOTE
from peftbench.optim import OPTIMIZER_LIBRARIES
from peftbench.profiler.instruments import FLOP_COUNT_STEP
from peftbench.profiler.memory import max_over_ranks
from peftbench.profiler.peak_flops import get_peak_flops
from peftbench.profiler.throughput import compute_throughput
from peftbench.record import Compute, CountedStep, Engine, Flops, Outcome, RunRecord, SavedModel, Throughput, Tokens
from peftbench.record.environment import get_git_commit, get_library_versions
from peftbench.record.sanity_checks import check_record

if TYPE_CHECKING:
    from peftbench.run.rank_measurements import RankMeasurements
    from peftbench.run.state import RunState

_T = TypeVar("_T")


def build_record(state: RunState, outcome: Outcome, ranks: RankMeasurements, notes: Sequence[str]) -> RunRecord:
    """Return the record of a run that ended with ``outcome``, whatever stage it reached.

    ``ranks`` is empty if a rank did not reach the end of the run; memory is then that of this rank alone. ``notes`` are
    followed by one for each number that fails a sanity check.
    """
    progress, probe = state.progress, state.probe
    record = RunRecord(
        name=state.recipe.name,
        started_at=state.started_at,
        recipe=state.requested_recipe.model_dump(mode="json"),
        recipe_fingerprint=state.requested_recipe.fingerprint(),
        outcome=outcome,
        device=describe_device(state.accelerator),
        library_versions=get_library_versions(OPTIMIZER_LIBRARIES),
        git_commit=get_git_commit(),
        engine=_build_engine(state),
        parameters=state.adapted_model.parameters if state.adapted_model else None,
        saved_model=_build_saved_model(state),
        model_fingerprint=state.adapted_model.base.fingerprint if state.adapted_model else None,
        model_config_fingerprint=state.adapted_model.base.config_fingerprint if state.adapted_model else None,
        data_fingerprint=state.data_fingerprint,
        num_examples=state.num_examples,
        num_dropped_examples=state.num_dropped,
        num_cut_examples=state.num_cut,
        num_cut_labels=state.num_cut_labels,
        num_control_token_examples=state.num_with_control_tokens,
        split_overlap=state.split_overlap,
        tokens=Tokens(**vars(progress.token_counts)) if state.training else None,
        steps=progress.completed_steps,
        skipped_steps=progress.skipped_steps,
        step_losses=tuple(progress.losses),
        step_tokens=tuple(counts.real for counts in progress.step_token_counts),
        step_seconds=tuple(probe.step_seconds[: progress.completed_steps]),
        untimed_steps=min(state.recipe.profile.untimed_steps, progress.completed_steps),
        stopped_early=progress.stopped_early,
        held_out_curve=state.held_out_curve,
        forgetting=state.forgetting,
        resumed_after=tuple(state.resumed_after),
        phase_seconds=dict(probe.phase_seconds),
        throughput=_build_throughput(state) if state.is_trained else None,
        memory=dict(probe.memory) | max_over_ranks(ranks.memory_by_rank),
        memory_by_rank=ranks.memory_by_rank,
        step_memory=dict(probe.step_memory) | max_over_ranks(ranks.step_memory_by_rank),
        step_memory_by_rank=ranks.step_memory_by_rank,
        step_part_seconds=probe.compute_step_part_seconds(),
        part_timed_steps=tuple(probe.part_timed_steps),
        cuda_context_bytes=ranks.cuda_context_bytes if ranks.memory_by_rank else probe.memory_meter.cuda_context_bytes,
        state_bytes=max(ranks.state_bytes_by_rank, key=lambda states: states.total, default=None),
        state_bytes_by_rank=ranks.state_bytes_by_rank,
        memory_breakdown=state.build_memory_breakdown(),
        flops=_build_flops(state, ranks.counted_flops),
        compute=_build_compute(state, ranks.matmul_flops) if state.is_trained else Compute(),
        energy_joules=ranks.energy_joules if state.is_trained else None,
        quality=state.quality,
    )
    record = record.model_copy(update={"notes": tuple(notes)})
    if state.trained_record is not None:
        record = add_evaluation(state.trained_record, record)
    return record.model_copy(update={"notes": (*record.notes, *check_record(record))})


def add_evaluation(trained: RunRecord, evaluated: RunRecord) -> RunRecord:
    """Return the record of a training with the evaluation of its saved model, which another process made.

    What belongs to the training stays: its examples, its data if they have changed since, and its measurements.
    """
    phases = {"evaluate", "generate"}
    dropped_notes = set(check_record(trained))
    notes = [note for note in trained.notes if note not in dropped_notes and not note.startswith(HALVED_BATCH_NOTE)]
    counts = (
        "num_examples",
        "num_dropped_examples",
        "num_cut_examples",
        "num_cut_labels",
        "num_control_token_examples",
    )
    return trained.model_copy(
        update={
            "evaluated_at": evaluated.started_at,
            "recipe": evaluated.recipe,
            "recipe_fingerprint": evaluated.recipe_fingerprint,
            "outcome": evaluated.outcome,
            "data_fingerprint": evaluated.data_fingerprint,
            **{name: getattr(evaluated, name) | _keep_splits(getattr(trained, name), trained) for name in counts},
            "split_overlap": evaluated.split_overlap or trained.split_overlap,
            "phase_seconds": _replace_phases(trained.phase_seconds, evaluated.phase_seconds, phases),
            "memory": _replace_phases(trained.memory, evaluated.memory, phases),
            "memory_by_rank": _replace_phases_by_rank(trained.memory_by_rank, evaluated.memory_by_rank, phases),
            "forgetting": evaluated.forgetting,
            "quality": evaluated.quality,
            "notes": tuple(dict.fromkeys((*notes, *evaluated.notes))),
        }
    )


def _keep_splits(counts: Mapping[str, int], trained: RunRecord) -> dict[str, int]:
    """Return the counts of the splits that the training used."""
    used = {"train", trained.held_out_curve.split if trained.held_out_curve is not None else "train"}
    return {split: count for split, count in counts.items() if split in used}


def _replace_phases(old: Mapping[str, _T], new: Mapping[str, _T], phases: Collection[str]) -> dict[str, _T]:
    """Return ``old`` with the values that ``new`` has for ``phases``, and no others for them."""
    kept = {name: value for name, value in old.items() if name not in phases}
    return kept | {name: value for name, value in new.items() if name in phases}


def _replace_phases_by_rank(
    old: Sequence[Mapping[str, _T]], new: Sequence[Mapping[str, _T]], phases: Collection[str]
) -> tuple[dict[str, _T], ...]:
    """Return ``old`` with the values of ``new`` for ``phases``, and none for them on another number of ranks."""
    same_ranks = new if len(new) == len(old) else [{}] * len(old)
    return tuple(_replace_phases(*pair, phases) for pair in zip(old, same_ranks, strict=True))


def _select_timed_steps(state: RunState, step_values: Sequence[_T]) -> list[_T]:
    """Return the values of timed steps: those after the untimed steps of each process."""
    return [value for value, timed in zip(step_values, state.probe.timed_mask, strict=False) if timed]


def _build_throughput(state: RunState) -> Throughput | None:
    train_seconds = state.probe.phase_seconds.get("train")
    if train_seconds is None:
        return None
    return compute_throughput(
        _select_timed_steps(state, state.probe.step_seconds),
        _select_timed_steps(state, state.progress.step_token_counts),
        train_seconds=train_seconds,
        global_batch_size=state.recipe.train.global_batch_size,
    )


def _build_flops(state: RunState, counted_flops: int | None) -> Flops:
    if state.adapted_model is None or state.training is None:
        return Flops()
    cost, progress = state.training.flop_cost, state.progress
    counted_step = None
    if counted_flops is not None:
        index = FLOP_COUNT_STEP - 1
        units = progress.step_executed[index], progress.step_skipped[index]
        closed_form = cost.compute_hardware_flops(*units) if cost else None
        counted_step = CountedStep(step=FLOP_COUNT_STEP, counted_flops=counted_flops, closed_form_flops=closed_form)
    return Flops(
        model_flops=sum(map(cost.compute_model_flops, progress.step_required)) if cost else None,
        hardware_flops=(
            sum(map(cost.compute_hardware_flops, progress.step_executed, progress.step_skipped)) if cost else None
        ),
        six_n=6 * state.adapted_model.six_n_parameters * progress.token_counts.padded,
        counted_step=counted_step,
    )


def _build_compute(state: RunState, matmul_flops: float | None) -> Compute:
    seconds = state.probe.phase_seconds.get("train")
    if state.training is None or state.training.flop_cost is None or not seconds:
        return Compute()
    cost, progress = state.training.flop_cost, state.progress
    peak = get_peak_flops(describe_device(state.accelerator).name, state.recipe.train.resolved_precision)
    model_flops = sum(map(cost.compute_model_flops, _select_timed_steps(state, progress.step_required)))
    executed, skipped = (_select_timed_steps(state, units) for units in (progress.step_executed, progress.step_skipped))
    hardware_flops = sum(map(cost.compute_hardware_flops, executed, skipped))
    return Compute(
        model_flops_per_second=model_flops / seconds,
        hardware_flops_per_second=hardware_flops / seconds,
        peak_flops_per_second=None if peak is None else peak * state.accelerator.num_processes,
        matmul_flops_per_second=matmul_flops,
    )


def _build_engine(state: RunState) -> Engine | None:
    training, accelerator, engine = state.training, state.accelerator, state.engine
    if training is None:
        return None
    optimizer = unwrap_optimizer(training.optimizer)
    return Engine(
        name=engine.name,
        model_class=type(training.model).__qualname__,
        distributed_type=str(accelerator.distributed_type.value),
        mixed_precision=state.context.precision if engine.is_deepspeed else str(accelerator.mixed_precision),
        max_grad_norm=state.recipe.train.max_grad_norm,
        optimizer_class=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        micro_batch_size=training.batches.max_micro_batch_size,
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
        num_threads=torch.get_num_threads(),
    )


def _build_saved_model(state: RunState) -> SavedModel | None:
    """Return the size of the saved weights, None if this training has no saved model."""
    if not state.has_saved_model or state.adapted_model is None:
        return None
    weights = sum(file.stat().st_size for file in state.run_dir.model_dir.glob("*.safetensors"))
    adapted = state.adapted_model
    return SavedModel(
        weight_bytes=weights,
        merges_into_base=adapted.merges_into_base,
        needs_linear_layers=state.recipe.method.replaces_conv1d(adapted.base.model.config),
    )
