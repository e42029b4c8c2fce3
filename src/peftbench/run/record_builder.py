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
from peftbench.distributed.deepspeed import unwrap_chain
from peftbench.distributed.collectives import all_gather_objects
from peftbench.distributed.sharding import state_bytes
from peftbench.record.sanity_checks import check_record
from peftbench.profiler.peak_flops import get_peak_flops
from peftbench.profiler.instruments import FLOP_COUNT_STEP
from peftbench.profiler.memory import max_over_ranks
from peftbench.profiler.throughput import compute_throughput
from peftbench.record import MemoryBreakdown, Compute, CountedStep, Engine, Flops, Memory, Outcome, RunRecord, StateBytes, Throughput, Tokens

if TYPE_CHECKING:
    from peftbench.run.runner import Run

N = TypeVar("N", int, float)
T = TypeVar("T")
_LIBRARIES = (
    "peftbench", "torch", "accelerate", "transformers", "peft", "datasets", "evaluate", "tokenizers", "deepspeed",
    "bitsandbytes", "pytorch-optimizer", "apollo-torch", "torchao",
)  # fmt: skip


@dataclass(frozen=True)
class RankMeasurements:
    """What all ranks have measured, once they have come to the end of the work."""

    memory: tuple[dict[str, Memory], ...] = ()
    step_memory: tuple[dict[str, Memory], ...] = ()
    context_bytes: int | None = None
    counted_flops: int | None = None
    energy_joules: float | None = None
    achievable_per_second: float | None = None
    state_bytes: tuple[StateBytes, ...] = ()

    @classmethod
    def of(cls, run: Run, achievable: float | None = None) -> RankMeasurements:
        """Ask every rank; each must come here."""
        probe, looked = run.probe, run.inspection
        counted = looked.flops.total if looked and looked.flops and run.progress.steps else run.kept.get("counted")
        joules = probe.phase_joules.get("train")
        mine = (
            dict(probe.memory), dict(probe.step_memory), probe.meter.context_bytes, counted, joules, achievable,
            _measure_state_bytes(run),
        )  # fmt: skip
        memory, step_memory, contexts, every_count, every_joule, every_achievable, states = zip(
            *all_gather_objects(run.accelerator, mine), strict=True
        )
        context = max((size for size in contexts if size is not None), default=None)
        return cls(
            memory, step_memory, context, _sum_if_all_known(every_count), _sum_if_all_known(every_joule), _sum_if_all_known(every_achievable),
            tuple(state for state in states if state is not None),
        )  # fmt: skip


def _sum_if_all_known(values: Sequence[N | None]) -> N | None:
    """Of what all ranks know; None where one does not."""
    known = [value for value in values if value is not None]
    return sum(known[1:], known[0]) if len(known) == len(values) else None


def build_record(run: Run, outcome: Outcome) -> RunRecord:
    """The record of ``run`` as it stands, with a note for each figure that cannot be."""
    progress, probe = run.progress, run.probe
    # Where a rank did not come to the end, nobody may wait for it.
    together = run.together or (RankMeasurements.of(run) if run.accelerator.num_processes == 1 else RankMeasurements())
    ended_well = outcome.kind == "ok"
    record = RunRecord(
        name=run.recipe.name,
        started_at=run.started_at,
        recipe=run.asked.model_dump(mode="json"),
        recipe_fingerprint=run.asked.fingerprint(),
        outcome=outcome,
        device=describe_device(run.accelerator),
        versions=get_library_versions(),
        git=_get_git_commit(),
        engine=_build_engine(run),
        parameters=run.built.parameters if run.built else None,
        model_identity=run.built.base.identity if run.built else None,
        data_identity=run.data_identity,
        examples=run.examples,
        dropped=run.dropped,
        tokens=Tokens(**vars(progress.counts)) if run.trainer else None,
        steps=progress.steps,
        skipped_steps=progress.skipped,
        losses=tuple(progress.losses),
        step_tokens=tuple(counts.real for counts in progress.step_counts),
        step_seconds=tuple(probe.step_seconds[: progress.steps]),
        warmup_steps=min(run.recipe.profile.untimed_steps, progress.steps),
        resumed_after=tuple(run.resumed_after),
        phase_seconds=dict(probe.phase_seconds),
        throughput=_build_throughput(run) if ended_well else None,
        memory=dict(probe.memory) | max_over_ranks(together.memory),
        memory_by_rank=together.memory,
        step_memory=dict(probe.step_memory) | max_over_ranks(together.step_memory),
        step_memory_by_rank=together.step_memory,
        part_seconds=probe.part_seconds(),
        timed_steps=tuple(probe.timed_steps),
        # Of this rank alone where the others did not come to the end.
        context_bytes=together.context_bytes if together.memory else probe.meter.context_bytes,
        state_bytes=max(together.state_bytes, key=lambda states: states.total, default=None),
        state_bytes_by_rank=together.state_bytes,
        breakdown=build_memory_breakdown(run),
        flops=_build_flops(run, together.counted_flops),
        compute=_build_compute(run, together.achievable_per_second) if ended_well else Compute(),
        energy_joules=together.energy_joules if ended_well else None,
        quality=run.quality,
    )
    return record.model_copy(update={"notes": (*run.notes, *run.shortage.notes, *check_record(record))})


def _select_timed_steps(run: Run, of_steps: Sequence[T]) -> list[T]:
    """What belongs to steps that are in the figures."""
    return [value for value, timed in zip(of_steps, run.probe.timed, strict=False) if timed]


def _build_throughput(run: Run) -> Throughput | None:
    train_seconds = run.probe.phase_seconds.get("train")
    if train_seconds is None:
        return None
    return compute_throughput(
        _select_timed_steps(run, run.probe.step_seconds), _select_timed_steps(run, run.progress.step_counts),
        train_seconds=train_seconds, global_batch=run.recipe.train.global_batch_size,
    )  # fmt: skip


def _measure_state_bytes(run: Run) -> StateBytes | None:
    if run.built is None or run.trainer is None or not run.progress.steps:
        return None
    device = run.accelerator.device.type
    return state_bytes(run.engine, run.built.bare_model, run.trainer.optimizer, run.recipe.optimizer, device)


def build_memory_breakdown(run: Run) -> MemoryBreakdown | None:
    """Who held the memory at its peak, where that was looked at, by this process or one before it."""
    step = run.recipe.profile.untimed_steps
    if kept := run.kept.get("breakdown"):
        return MemoryBreakdown(**kept)
    if run.inspection is None or run.inspection.breakdown is None or run.progress.steps < step:
        return None
    peak, (rows, width) = run.inspection.breakdown.peak(), run.progress.step_shapes[step - 1]
    return MemoryBreakdown(
        step=step, rows=rows, width=width, peak_bytes=peak.bytes, bytes_by_kind=peak.by_kind,
        operation=peak.operation, part=peak.part,
    )  # fmt: skip


def _build_flops(run: Run, counted: int | None) -> Flops:
    if run.built is None or run.trainer is None:
        return Flops()
    cost, done = run.trainer.cost, run.progress
    checked = None
    if counted is not None:
        closed_form = cost.executed(done.step_executed[FLOP_COUNT_STEP - 1]) if cost else None
        checked = CountedStep(step=FLOP_COUNT_STEP, counted=counted, closed_form=closed_form)
    return Flops(
        required=sum(map(cost.required, done.step_required)) if cost else None,
        executed=sum(map(cost.executed, done.step_executed)) if cost else None,
        six_n=6 * run.built.six_n_parameters * done.counts.padded,
        counted_step=checked,
    )


def _build_compute(run: Run, achievable: float | None) -> Compute:
    seconds = run.probe.phase_seconds.get("train")
    if run.trainer is None or run.trainer.cost is None or not seconds:
        return Compute()
    cost, done, processes = run.trainer.cost, run.progress, run.accelerator.num_processes
    peak = get_peak_flops(describe_device(run.accelerator).name, run.recipe.train.precision)
    return Compute(
        required_per_second=sum(map(cost.required, _select_timed_steps(run, done.step_required))) / seconds,
        executed_per_second=sum(map(cost.executed, _select_timed_steps(run, done.step_executed))) / seconds,
        peak_per_second=None if peak is None else peak * processes,
        achievable_per_second=achievable,
    )


def _build_engine(run: Run) -> Engine | None:
    if run.trainer is None:
        return None
    optimizer = list(unwrap_chain(run.trainer.optimizer))[-1]
    return Engine(
        name=run.engine.name,
        model=type(run.trainer.model).__qualname__,
        kind=str(run.accelerator.distributed_type.value),
        mixed_precision=run.bound.precision if run.engine.deepspeed else str(run.accelerator.mixed_precision),
        max_grad_norm=run.recipe.train.max_grad_norm,
        optimizer=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        micro_batch=run.trainer.batches.largest_micro_batch,
        accumulation=run.accelerator.gradient_accumulation_steps,
        threads=torch.get_num_threads(),
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
