"""From what a run knows, whatever ended it, to its record."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from peftbench.distributed.accelerator import describe_device
from peftbench.distributed.collectives import all_gather_objects
from peftbench.distributed.deepspeed import unwrap_optimizer
from peftbench.distributed.sharding import state_bytes
from peftbench.optim import OPTIMIZER_LIBRARIES
from peftbench.profiler.instruments import FLOP_COUNT_STEP
from peftbench.profiler.memory import max_over_ranks
from peftbench.profiler.peak_flops import get_peak_flops
from peftbench.profiler.throughput import compute_throughput
from peftbench.record import (
    Compute,
    CountedStep,
    Engine,
    Flops,
    Memory,
    MemoryBreakdown,
    Outcome,
    RunRecord,
    StateBytes,
    Throughput,
    Tokens,
)
from peftbench.record.sanity_checks import check_record

if TYPE_CHECKING:
    from peftbench.run.runner import Run

N = TypeVar("N", int, float)
T = TypeVar("T")
_LIBRARIES = (
    "peftbench",
    "torch",
    "accelerate",
    "transformers",
    "peft",
    "datasets",
    "evaluate",
    "tokenizers",
    "deepspeed",
    "bitsandbytes",
    *(name for name in OPTIMIZER_LIBRARIES if name not in {"torch", "deepspeed", "bitsandbytes"}),
)


@dataclass(frozen=True)
class RankMeasurements:
    """What all ranks have measured, once they have come to the end of the work."""

    memory_by_rank: tuple[dict[str, Memory], ...] = ()
    step_memory_by_rank: tuple[dict[str, Memory], ...] = ()
    context_bytes: int | None = None
    counted_flops: int | None = None
    energy_joules: float | None = None
    measured_matmul_flops: float | None = None
    state_bytes_by_rank: tuple[StateBytes, ...] = ()

    @classmethod
    def gather(cls, run: Run, measured_matmul_flops: float | None = None) -> RankMeasurements:
        """Ask every rank; each must come here."""
        probe, looked = run.probe, run.instruments
        counted = (
            looked.flop_counter.total_flops
            if looked and looked.flop_counter and run.progress.completed_steps
            else run.resumed_measurements.get("counted")
        )
        joules = probe.phase_joules.get("train")
        mine = (
            dict(probe.memory),
            dict(probe.step_memory),
            probe.memory_meter.cuda_context_bytes,
            counted,
            joules,
            measured_matmul_flops,
            _measure_state_bytes(run),
        )
        memory, step_memory, contexts, every_count, every_joule, every_achievable, states = zip(
            *all_gather_objects(run.accelerator, mine), strict=True
        )
        context = max((size for size in contexts if size is not None), default=None)
        return cls(
            memory,
            step_memory,
            context,
            _sum_if_all_known(every_count),
            _sum_if_all_known(every_joule),
            _sum_if_all_known(every_achievable),
            tuple(state for state in states if state is not None),
        )


def _sum_if_all_known(values: Sequence[N | None]) -> N | None:
    """Of what all ranks know; None where one does not."""
    known = [value for value in values if value is not None]
    return sum(known[1:], known[0]) if len(known) == len(values) else None


def build_record(run: Run, outcome: Outcome) -> RunRecord:
    """The record of ``run`` as it stands, with a note for each figure that cannot be."""
    progress, probe = run.progress, run.probe
    # Where a rank did not come to the end, nobody may wait for it.
    together = run.rank_measurements or (
        RankMeasurements.gather(run) if run.accelerator.num_processes == 1 else RankMeasurements()
    )
    ended_well = outcome.kind == "ok"
    record = RunRecord(
        name=run.recipe.name,
        started_at=run.started_at,
        recipe=run.requested_recipe.model_dump(mode="json"),
        recipe_fingerprint=run.requested_recipe.fingerprint(),
        outcome=outcome,
        device=describe_device(run.accelerator),
        library_versions=get_library_versions(),
        git_commit=_get_git_commit(),
        engine=_build_engine(run),
        parameters=run.adapted_model.parameters if run.adapted_model else None,
        model_fingerprint=run.adapted_model.base.fingerprint if run.adapted_model else None,
        data_fingerprint=run.data_fingerprint,
        num_examples=run.examples,
        num_dropped_examples=run.dropped,
        tokens=Tokens(**vars(progress.token_counts)) if run.training else None,
        steps=progress.completed_steps,
        skipped_steps=progress.skipped_steps,
        step_losses=tuple(progress.losses),
        step_tokens=tuple(counts.real for counts in progress.step_token_counts),
        step_seconds=tuple(probe.step_seconds[: progress.completed_steps]),
        untimed_steps=min(run.recipe.profile.untimed_steps, progress.completed_steps),
        resumed_after=tuple(run.resumed_after),
        phase_seconds=dict(probe.phase_seconds),
        throughput=_build_throughput(run) if ended_well else None,
        memory=dict(probe.memory) | max_over_ranks(together.memory_by_rank),
        memory_by_rank=together.memory_by_rank,
        step_memory=dict(probe.step_memory) | max_over_ranks(together.step_memory_by_rank),
        step_memory_by_rank=together.step_memory_by_rank,
        step_part_seconds=probe.compute_step_part_seconds(),
        part_timed_steps=tuple(probe.part_timed_steps),
        # Of this rank alone where the others did not come to the end.
        cuda_context_bytes=together.context_bytes if together.memory_by_rank else probe.memory_meter.cuda_context_bytes,
        state_bytes=max(together.state_bytes_by_rank, key=lambda states: states.total, default=None),
        state_bytes_by_rank=together.state_bytes_by_rank,
        memory_breakdown=build_memory_breakdown(run),
        flops=_build_flops(run, together.counted_flops),
        compute=_build_compute(run, together.measured_matmul_flops) if ended_well else Compute(),
        energy_joules=together.energy_joules if ended_well else None,
        quality=run.quality,
    )
    return record.model_copy(update={"notes": (*run.notes, *run.oom_handler.notes, *check_record(record))})


def _select_timed_steps(run: Run, step_values: Sequence[T]) -> list[T]:
    """What belongs to steps that are in the figures."""
    return [value for value, timed in zip(step_values, run.probe.timed_mask, strict=False) if timed]


def _build_throughput(run: Run) -> Throughput | None:
    train_seconds = run.probe.phase_seconds.get("train")
    if train_seconds is None:
        return None
    return compute_throughput(
        _select_timed_steps(run, run.probe.step_seconds),
        _select_timed_steps(run, run.progress.step_token_counts),
        train_seconds=train_seconds,
        global_batch_size=run.recipe.train.global_batch_size,
    )


def _measure_state_bytes(run: Run) -> StateBytes | None:
    if run.adapted_model is None or run.training is None or not run.progress.completed_steps:
        return None
    device = run.accelerator.device.type
    return state_bytes(run.engine, run.adapted_model.model, run.training.optimizer, run.recipe.optimizer, device)


def build_memory_breakdown(run: Run) -> MemoryBreakdown | None:
    """Who held the memory at its peak, where that was looked at, by this process or one before it."""
    step = run.recipe.profile.untimed_steps
    if kept := run.resumed_measurements.get("breakdown"):
        return MemoryBreakdown(**kept)
    if run.instruments is None or run.instruments.memory_tracker is None or run.progress.completed_steps < step:
        return None
    peak, (rows, width) = run.instruments.memory_tracker.find_peak(), run.progress.step_shapes[step - 1]
    return MemoryBreakdown(
        step=step,
        micro_batch_size=rows,
        sequence_length=width,
        peak_bytes=peak.nbytes,
        bytes_by_category=peak.bytes_by_category,
        operation=peak.operation,
        step_part=peak.step_part,
    )


def _build_flops(run: Run, counted_flops: int | None) -> Flops:
    if run.adapted_model is None or run.training is None:
        return Flops()
    cost, done = run.training.flop_cost, run.progress
    checked = None
    if counted_flops is not None:
        closed_form = cost.compute_hardware_flops(done.step_executed[FLOP_COUNT_STEP - 1]) if cost else None
        checked = CountedStep(step=FLOP_COUNT_STEP, counted_flops=counted_flops, closed_form_flops=closed_form)
    return Flops(
        model_flops=sum(map(cost.compute_model_flops, done.step_required)) if cost else None,
        hardware_flops=sum(map(cost.compute_hardware_flops, done.step_executed)) if cost else None,
        six_n=6 * run.adapted_model.six_n_parameters * done.token_counts.padded,
        counted_step=checked,
    )


def _build_compute(run: Run, measured_matmul_flops: float | None) -> Compute:
    seconds = run.probe.phase_seconds.get("train")
    if run.training is None or run.training.flop_cost is None or not seconds:
        return Compute()
    cost, done, processes = run.training.flop_cost, run.progress, run.accelerator.num_processes
    peak = get_peak_flops(describe_device(run.accelerator).name, run.recipe.train.precision)
    return Compute(
        model_flops_per_second=sum(map(cost.compute_model_flops, _select_timed_steps(run, done.step_required)))
        / seconds,
        hardware_flops_per_second=sum(map(cost.compute_hardware_flops, _select_timed_steps(run, done.step_executed)))
        / seconds,
        peak_flops_per_second=None if peak is None else peak * processes,
        matmul_flops_per_second=measured_matmul_flops,
    )


def _build_engine(run: Run) -> Engine | None:
    if run.training is None:
        return None
    optimizer = unwrap_optimizer(run.training.optimizer)
    return Engine(
        name=run.engine.name,
        model_class=type(run.training.model).__qualname__,
        distributed_type=str(run.accelerator.distributed_type.value),
        mixed_precision=run.context.precision if run.engine.is_deepspeed else str(run.accelerator.mixed_precision),
        max_grad_norm=run.recipe.train.max_grad_norm,
        optimizer_class=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        micro_batch_size=run.training.batches.max_micro_batch_size,
        gradient_accumulation_steps=run.accelerator.gradient_accumulation_steps,
        num_threads=torch.get_num_threads(),
    )


def get_library_versions() -> dict[str, str]:
    """Of what a number may depend on, where it is installed."""
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _get_git_commit() -> str | None:
    """Commit of the checkout this package runs from, None where it is installed from elsewhere."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", os.fspath(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
