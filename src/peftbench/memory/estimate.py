"""Estimate the memory of a recipe without a GPU and without weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftbench.common.units import format_bytes
from peftbench.data.batches import compute_micro_batching
from peftbench.data.collate import Collator
from peftbench.distributed.accelerator import build_combination
from peftbench.distributed.compatibility import check
from peftbench.errors import EstimateUnavailableError, PrecisionError
from peftbench.memory.allocator import OutOfMemoryError
from peftbench.memory.families import with_bundled_config
from peftbench.memory.label_counts import LabelCount, count_labeled_tokens
from peftbench.memory.launch_config import SINGLE_PROCESS, LaunchConfig
from peftbench.memory.plan import Plan, Verdict
from peftbench.memory.replay import AllocatorReplay, replay_allocator
from peftbench.memory.simulation.architecture import check_buildable
from peftbench.memory.simulation.simulated_run import RunSize, simulate_run
from peftbench.memory.step_time import predict_time
from peftbench.modeling.loading import get_max_positions, load_config
from peftbench.training.data import build_layout

if TYPE_CHECKING:
    from peftbench.distributed.engines import EngineKind
    from peftbench.memory.devices import DeviceFacts
    from peftbench.memory.simulation.device import DeviceType
    from peftbench.profiler.memory_breakdown import MemoryEvent
    from peftbench.recipe.schema import Recipe


def estimate(
    recipe: Recipe,
    facts: DeviceFacts,
    device_name: str,
    budget_bytes: int | None = None,
    launch_config: LaunchConfig = SINGLE_PROCESS,
) -> Plan:
    """Return the memory plan of ``recipe`` on one device (rank 0), with a verdict for ``budget_bytes``.

    Raises:
        EstimateUnavailableError: the memory of some part of the recipe is not modeled; the message names the part.
        PeftbenchError: the recipe itself cannot run.
    """
    check_supported(recipe, launch_config.engine, facts.device_type)
    _check_precision(recipe, facts)
    check_buildable(recipe)
    size, label_count = _compute_size(recipe, launch_config.dp_world_size)
    run = simulate_run(_to_simulated(recipe), facts.capability, size, launch_config)
    step_time, time_notes = predict_time(
        run.operation_counts, recipe, facts, size.sequence_length, launch_config.engine
    )
    events = run.events
    replay = replay_allocator(events, facts.device_type)
    context, workspaces = _to_int_range(facts.context), _to_int_range(facts.workspaces)
    overhead = (context[0] + workspaces[0], context[1] + workspaces[1])
    paged_bytes = _count_paged_bytes(recipe, replay)
    process = (replay.reserved_bytes - paged_bytes + overhead[0], replay.reserved_bytes + overhead[1])
    verdict, margin = _judge_budget(
        events, process, facts, budget_bytes=budget_bytes, other_bytes=overhead[0] - paged_bytes
    )
    return Plan(
        name=recipe.name,
        engine=launch_config.engine.name,
        num_processes=launch_config.num_processes,
        device_name=device_name,
        calibrated=facts.calibrated,
        micro_batch_size=size.rows,
        sequence_length=size.sequence_length,
        gradient_accumulation_steps=size.num_micro_batches,
        evaluation_batch_size=recipe.evaluate.batch_size,
        step_flops=run.step_flops,
        phase_peaks=replay.peak_by_phase,
        peak_phase=replay.peak_phase,
        reserved_bytes=replay.reserved_bytes,
        process_bytes=process,
        resident_bytes=_compute_resident_bytes(process, facts) if facts.device_type == "cpu" else None,
        cuda_context_bytes=context,
        workspace_bytes=workspaces,
        budget_bytes=budget_bytes,
        verdict=verdict,
        margin_bytes=margin,
        step_time=step_time,
        notes=(*_build_notes(recipe, facts, size.sequence_length, label_count, paged_bytes), *run.notes, *time_notes),
    )


def _compute_size(recipe: Recipe, dp_world_size: int) -> tuple[RunSize, LabelCount]:
    """Return the sizes of a process's batches with the longest rows, and the labeled tokens of a row."""
    accumulation, rows = compute_micro_batching(
        recipe.train.global_batch_size, _max_micro_batch_size(recipe), dp_world_size
    )
    with with_bundled_config(recipe.model) as model_config:
        width = _max_sequence_length(recipe, get_max_positions(load_config(model_config)))
    label_count = count_labeled_tokens(recipe, width)
    rows_per_step = max(1, recipe.train.global_batch_size // dp_world_size)
    return RunSize(rows, width, label_count.tokens, accumulation, rows_per_step), label_count


def _check_precision(recipe: Recipe, facts: DeviceFacts) -> None:
    """Raise PrecisionError for bf16 on a GPU without it."""
    if recipe.train.resolved_precision == "bf16" and facts.device_type == "cuda" and not facts.capability.has_bf16:
        raise PrecisionError(f"{facts.torch_name} does not support train.precision=bf16; use fp16 or fp32")


def _compute_resident_bytes(process: tuple[int, int], facts: DeviceFacts) -> tuple[int, int]:
    """Return the minimum and maximum resident memory of a process on CPU.

    The minimum is the process with the smallest libraries. The maximum is twice the process with the largest ones,
    since glibc keeps freed blocks of up to 32 MiB: measured runs used up to 1.6 times their live bytes.
    """
    libraries = _to_int_range(facts.libraries)
    return process[0] + libraries[0], 2 * process[1] + libraries[1]


def _judge_budget(
    events: list[MemoryEvent],
    process: tuple[int, int],
    facts: DeviceFacts,
    *,
    budget_bytes: int | None,
    other_bytes: int,
) -> tuple[Verdict | None, tuple[int, int] | None]:
    """Return the verdict and the margin in bytes; None without a budget. ``other_bytes`` are not in tensors."""
    if budget_bytes is None:
        return None, None
    verdict = _decide_verdict(events, process, budget_bytes - other_bytes, budget_bytes, facts.device_type)
    return verdict, (budget_bytes - process[1], budget_bytes - process[0])


def _to_simulated(recipe: Recipe) -> Recipe:
    """Replace an optimizer that a simulation cannot step with one whose states have the same size."""
    return recipe.model_copy(update={"optimizer": recipe.optimizer.to_simulated()})


def _count_paged_bytes(recipe: Recipe, replay: AllocatorReplay) -> int:
    """Return the bytes of optimizer state that the driver may page out to host memory."""
    if not recipe.optimizer.is_paged:
        return 0
    return max(peak.live_bytes_by_category.get("optimizer_state", 0) for peak in replay.peak_by_phase.values())


def _to_int_range(size_range: tuple[int, int]) -> tuple[int, int]:
    """Convert pydantic's ByteSize to int, which JSON can hold."""
    return int(size_range[0]), int(size_range[1])


def check_supported(recipe: Recipe, engine: EngineKind, device_type: DeviceType) -> None:
    """Check that the recipe runs on the engine and device, and that its memory is modeled.

    Raises:
        CombinationError: it does not run.
        EstimateUnavailableError: its memory is not modeled; the message names the part.
    """
    if not recipe.method.is_trainable:
        raise EstimateUnavailableError(f"{recipe.method.kind} trains nothing; estimate a recipe whose method trains")
    check(build_combination(recipe, engine), device_type)
    if engine.offloads_to_nvme:
        raise EstimateUnavailableError(
            f"The memory of state that {engine.name} offloads to NVMe is not modeled; use zero3_offload"
        )
    if device_type == "cpu" and recipe.train.resolved_precision != "fp32":
        raise EstimateUnavailableError(
            f"there is no memory estimate for train.precision={recipe.train.resolved_precision} on CPU, because "
            "CPU kernels convert values to float32 in buffers that are not modeled; use train.precision=fp32"
        )
    if recipe.model.quantization == "int8":
        raise EstimateUnavailableError(
            "The memory of int8 outliers depends on the weights' values; use model.quantization=nf4 or null"
        )


def _max_micro_batch_size(recipe: Recipe) -> int | None:
    """Return the row limit of a micro-batch; train.micro_batch_tokens is divided by the longest row, rounded up."""
    if recipe.train.micro_batch_tokens is None:
        return recipe.train.resolved_micro_batch_size
    with with_bundled_config(recipe.model) as model_config:
        max_positions = get_max_positions(load_config(model_config))
    width = _max_sequence_length(recipe, max_positions) + recipe.method.virtual_tokens
    return math.ceil(recipe.train.micro_batch_tokens / width)


def _max_sequence_length(recipe: Recipe, max_positions: int | None) -> int:
    """Return the number of tokens in the longest row, padded to data.pad_to_multiple_of."""
    virtual = recipe.method.virtual_tokens
    longest = build_layout(recipe, max_positions).max_length
    return Collator(
        0, virtual, pad_to_multiple_of=recipe.data.pad_to_multiple_of, max_positions=max_positions
    ).padded_width(longest)


def _decide_verdict(
    events: list[MemoryEvent],
    process_bytes: tuple[int, int],
    tensor_bytes: int,
    budget_bytes: int,
    device_type: DeviceType,
) -> Verdict:
    """Return "fits" if the upper bound fits; "does not fit" if the replay runs out of memory at the lower bound.

    ``tensor_bytes`` is what the smallest context and workspaces leave of the budget for tensors.
    """
    if process_bytes[1] <= budget_bytes:
        return "fits"
    try:
        replay_allocator(events, device_type, capacity=tensor_bytes)
    except OutOfMemoryError:
        return "does not fit"
    return "too close to say"


def _build_notes(
    recipe: Recipe, facts: DeviceFacts, sequence_length: int, labels: LabelCount, paged_bytes: int
) -> tuple[str, ...]:
    notes = [
        f"assumes rows of {sequence_length} tokens (the limit of data.max_length or the model) with "
        f"{labels.tokens} labeled tokens ({labels.source})"
    ]
    if paged_bytes:
        notes.append(f"the driver can page out up to {format_bytes(paged_bytes)} of optimizer state to host memory")
    if recipe.train.feature_cache is not None:
        notes.append("assumes steps that compute the frozen part; steps that read the feature cache need less")
    if not facts.calibrated:
        notes.append("uncalibrated: context and workspaces were not measured on this device")
    return tuple(notes)
