"""From a recipe to a plan, without a GPU and without weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftbench.data.batches import compute_micro_batching
from peftbench.data.collate import Collator
from peftbench.data.encode import SequenceLayout
from peftbench.distributed.accelerator import build_combination
from peftbench.distributed.compatibility import check
from peftbench.errors import BudgetTooSmallError, EstimateUnavailableError, PrecisionError
from peftbench.memory.allocator import OutOfMemoryError
from peftbench.memory.families import with_bundled_config
from peftbench.memory.launch_config import SINGLE_PROCESS, LaunchConfig
from peftbench.memory.plan import PhasePeak, Plan, Verdict
from peftbench.memory.replay import AllocatorReplay, PeakUsage, replay_allocator
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.modeling.loading import get_max_positions, load_config

if TYPE_CHECKING:
    from peftbench.distributed.engines import EngineKind
    from peftbench.memory.devices import DeviceFacts
    from peftbench.memory.simulation.device import DeviceType
    from peftbench.profiler.memory_breakdown import MemoryEvent
    from peftbench.recipe.schema import Recipe


MIN_LABELLED_TOKENS = 64
"""Labelled tokens of a row, where summaries are generated shorter: those to learn from may be longer."""


def estimate(
    recipe: Recipe,
    facts: DeviceFacts,
    device_name: str,
    budget_bytes: int | None = None,
    launch_config: LaunchConfig = SINGLE_PROCESS,
) -> Plan:
    """What ``recipe`` would hold on one GPU with these ``facts``, and whether that fits ``budget`` bytes.

    With several processes, each on a GPU of its own, it is what the first of them holds.

    Raises:
        NotEstimatedError: something in it is not predicted, and is named.
        NoRoomError: the budget is less than the weights alone.
        PeftbenchError: the recipe itself cannot be run.
    """
    _check_supported(recipe, launch_config.engine, facts.device_type)
    if recipe.train.precision == "bf16" and not facts.bf16:
        raise PrecisionError(f"train.precision=bf16 is not there on {facts.torch_name}; use fp16 or fp32")
    accumulation, rows = compute_micro_batching(
        recipe.train.global_batch_size, _max_micro_batch_size(recipe), launch_config.num_processes
    )
    rehearsal = MemorySimulation(
        _replace_paged_optimizer(recipe),
        facts.device_type,
        accumulation,
        has_padding=rows > 1,
        launch_config=launch_config,
    )
    width = _max_sequence_length(recipe, rehearsal.max_positions)
    labels = min(max(recipe.evaluate.max_new_tokens, MIN_LABELLED_TOKENS), width - 1)
    flops = rehearsal.step_flops(max(1, recipe.train.global_batch_size // launch_config.num_processes), width, labels)
    with rehearsal:
        rehearsal.simulate_training(rows, width, labels)
        rehearsal.simulate_evaluation(recipe.evaluate.batch_size, width, labels)
        if recipe.evaluate.generate:
            new = recipe.evaluate.max_new_tokens
            rehearsal.simulate_generation(recipe.evaluate.batch_size * recipe.evaluate.num_beams, width - new, new)
    events = list(rehearsal.memory_tracker.iter_events())
    found = replay_allocator(events, facts.device_type)
    context, workspaces = _to_int_range(facts.context), _to_int_range(facts.workspaces)
    overhead = (context[0] + workspaces[0], context[1] + workspaces[1])
    away = _count_paged_bytes(recipe, found)
    process = (found.reserved_bytes - away + overhead[0], found.reserved_bytes + overhead[1])
    verdict, margin = None, None
    if budget_bytes is not None:
        weights = found.peak.live_bytes_by_category["weights"]
        if budget_bytes < weights:
            raise BudgetTooSmallError(
                f"{budget_bytes:,} bytes do not hold the {weights:,} of the weights alone; give more"
            )
        verdict = _decide_verdict(events, process, budget_bytes - overhead[0] + away, budget_bytes, facts.device_type)
        margin = (budget_bytes - process[1], budget_bytes - process[0])
    parts = {name: _build_phase_peak(moment) for name, moment in found.peak_by_phase.items()}
    return Plan(
        name=recipe.name,
        engine=launch_config.engine.name,
        num_processes=launch_config.num_processes,
        device_name=device_name,
        calibrated=facts.calibrated,
        micro_batch_size=rows,
        sequence_length=width,
        gradient_accumulation_steps=accumulation,
        evaluation_batch_size=recipe.evaluate.batch_size,
        step_flops=flops,
        phase_peaks=parts,
        peak_phase=found.peak.phase,
        reserved_bytes=found.reserved_bytes,
        process_bytes=process,
        cuda_context_bytes=context,
        workspace_bytes=workspaces,
        budget_bytes=budget_bytes,
        verdict=verdict,
        margin_bytes=margin,
        notes=_build_notes(recipe, facts, width, labels, away),
    )


def _replace_paged_optimizer(recipe: Recipe) -> Recipe:
    """The recipe with states that the driver does not move, and that are as large."""
    return recipe.model_copy(update={"optimizer": recipe.optimizer.without_paging()})


def _count_paged_bytes(recipe: Recipe, replay: AllocatorReplay) -> int:
    """Bytes that the driver can move to the CPU's memory."""
    if not recipe.optimizer.is_paged:
        return 0
    return max(moment.live_bytes_by_category["optimizer_state"] for moment in replay.peak_by_phase.values())


def _to_int_range(size_range: tuple[int, int]) -> tuple[int, int]:
    """Numbers, which JSON has, of pydantic's sizes."""
    return int(size_range[0]), int(size_range[1])


def _check_supported(recipe: Recipe, engine: EngineKind, device_type: DeviceType) -> None:
    if not recipe.method.is_trainable:
        raise EstimateUnavailableError(f"{recipe.method.kind} trains nothing; estimate a recipe of a method that does")
    check(build_combination(recipe, engine), device_type)
    if engine.offloads_to_nvme:
        raise EstimateUnavailableError(
            f"what {engine.name} keeps on a disk, and brings, is not predicted; use zero3_offload"
        )
    if device_type == "cpu" and recipe.train.precision != "fp32":
        raise EstimateUnavailableError(
            "in bf16 the CPU's kernels convert what they are given in memory of their own, which is not predicted; use "
            "train.precision=fp32, or --device with a GPU"
        )
    if recipe.model.quantization == "int8":
        raise EstimateUnavailableError(
            "outliers of an int8 base depend on its values; use model.quantization=nf4 or null"
        )
    if recipe.optimizer.is_cpu_only:
        raise EstimateUnavailableError(
            f"{recipe.optimizer.kind} would be compiled and steps for real; use optimizer.kind=adamw"
        )
    if recipe.model.attention == "flash_attention_2":
        raise EstimateUnavailableError(
            "flash_attention_2 is not predicted; use model.attention=sdpa, which is near to it"
        )


def _max_micro_batch_size(recipe: Recipe) -> int | None:
    """Most rows of a micro-batch; where it is given in tokens, as many of the longest as are not less than those."""
    if recipe.train.micro_batch_tokens is None:
        return recipe.train.resolved_micro_batch_size
    with with_bundled_config(recipe.model) as at_hand:
        width = _max_sequence_length(recipe, get_max_positions(load_config(at_hand))) + recipe.method.virtual_tokens
    return math.ceil(recipe.train.micro_batch_tokens / width)


def _max_sequence_length(recipe: Recipe, max_positions: int | None) -> int:
    """Of the longest row, padded to its multiple."""
    virtual = recipe.method.virtual_tokens
    longest = SequenceLayout.for_model(
        separator=recipe.data.separator,
        max_length=recipe.data.max_length,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        max_positions=max_positions,
        virtual_tokens=virtual,
    ).max_length
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
    """Fits by the most that it may take; does not fit if even the least beside ``tensors`` leaves those too little."""
    if process_bytes[1] <= budget_bytes:
        return "fits"
    try:
        replay_allocator(events, device_type, capacity=tensor_bytes)
    except OutOfMemoryError:
        return "does not fit"
    return "too close to say"


def _build_phase_peak(peak: PeakUsage) -> PhasePeak:
    return PhasePeak(
        live_bytes=peak.live_bytes,
        allocated_bytes=peak.allocated_bytes,
        live_bytes_by_category={kind: value for kind, value in peak.live_bytes_by_category.items() if value},
        operation=peak.operation,
    )


def _build_notes(
    recipe: Recipe, facts: DeviceFacts, sequence_length: int, labelled_tokens: int, paged_bytes: int
) -> tuple[str, ...]:
    notes = [
        f"for rows of {sequence_length} tokens, as many as data.max_length or the model allows, with {labelled_tokens} of them labelled, "
        f"as many as evaluate.max_new_tokens makes, and no fewer than {MIN_LABELLED_TOKENS}"
    ]
    if paged_bytes:
        notes.append(f"the driver moves {paged_bytes:,} bytes of states to the CPU's memory where there is no room")
    if recipe.train.feature_cache is not None:
        notes.append("for steps that compute the trunk; those that read its states from the trunk cache take less")
    if not facts.calibrated:
        notes.append("what only the device knows (context, workspaces) was not measured on one: uncalibrated")
    return tuple(notes)
