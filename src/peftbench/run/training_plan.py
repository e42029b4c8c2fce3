"""Predict the memory of a finished training, for the rows that it had."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from peftbench.data.batches import compute_micro_batching
from peftbench.data.collate import PaddingFreeCollator
from peftbench.distributed.engines import SINGLE
from peftbench.memory.advisor import AdviceRequest, build_plan, request_plan
from peftbench.memory.devices import get_device_facts, get_facts_by_torch_name
from peftbench.memory.plan import Plan, UnplannedRun
from peftbench.memory.search import with_evaluation_batch, with_micro_batch
from peftbench.memory.suggestion import EVALUATION_PHASES
from peftbench.record import PlannedMemory, RecordedPlan

if TYPE_CHECKING:
    from peftbench.data.batches import Batches
    from peftbench.recipe.schema import Recipe
    from peftbench.run.state import RunState


@dataclass(frozen=True)
class _Rows:
    """The rows of one rank that are planned."""

    step: int | None
    """The step that they are from, None for all steps."""
    positions: int
    """The most rows of a micro-batch times the longest row, padding included."""
    size: int
    """Rows of a micro-batch."""
    length: int
    """Tokens of equal rows that fill the largest micro-batch."""
    labeled_tokens: int | None
    """Labeled tokens of equal rows that have as many as the micro-batch with the most; None if unknown."""

    @classmethod
    def from_state(cls, state: RunState) -> Self:
        """Return the rows of the largest micro-batch, on CPU those of the step whose memory was broken down."""
        assert state.training is not None
        progress, batches = state.progress, state.training.batches
        breakdown = state.build_memory_breakdown() if state.accelerator.device.type == "cpu" else None
        steps = slice(None) if breakdown is None else slice(breakdown.step - 1, breakdown.step)
        shapes, counts = progress.step_shapes[steps], progress.step_max_labeled[steps]
        width = max(width for _, width in shapes)
        size = batches.max_micro_batch_size or _count_rows_within_tokens(state.recipe, batches, width)
        length = width
        if isinstance(batches.collator, PaddingFreeCollator):  # one row of all examples, with their virtual tokens
            length = math.ceil(width / size) - batches.collator.virtual_tokens
        return cls(
            None if breakdown is None else breakdown.step,
            max(rows for rows, _ in shapes) * width,
            size,
            length,
            math.ceil(max(counts) / size) if len(counts) == len(shapes) else None,
        )

    def set_in(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these rows, and as little evaluation as a plan allows."""
        # Padding is part of the length.
        data = recipe.data.model_copy(update={"max_length": self.length, "pad_to_multiple_of": 1})
        evaluate = recipe.evaluate.model_copy(update={"metrics": (), "max_new_tokens": 1})
        changed = recipe.model_copy(update={"data": data, "evaluate": evaluate})
        return with_evaluation_batch(with_micro_batch(changed, self.size), 1)


def _count_rows_within_tokens(recipe: Recipe, batches: Batches, width: int) -> int:
    """Return the rows that fill a micro-batch of at most ``train.micro_batch_tokens`` positions.

    A packed micro-batch of ``width`` positions has rows of ``data.max_length``, since their number is not known.
    """
    if isinstance(batches.collator, PaddingFreeCollator):
        longest = (recipe.data.max_length or width) + batches.collator.virtual_tokens
        limit = math.ceil(width / longest)
    else:
        assert recipe.train.micro_batch_tokens is not None
        limit = recipe.train.micro_batch_tokens // (width + batches.collator.virtual_tokens)
    return compute_micro_batching(batches.global_batch_size, max(1, limit), batches.world_size)[1]


def plan_training(state: RunState) -> RecordedPlan:
    """Return the predicted memory of the training on rank 0 for this run's device, or why there is none.

    The prediction runs in this process, or in one of its own if this process has an engine's process group. It leaves
    the state of torch's random numbers as it was.
    """
    device, rows = state.accelerator.device, _Rows.from_state(state)
    is_cuda = device.type == "cuda"
    device_name = torch.cuda.get_device_properties(device).name if is_cuda else "cpu"
    request = AdviceRequest.from_environment(
        rows.set_in(state.recipe), None, device_name, labeled_tokens=rows.labeled_tokens
    )
    try:
        with torch.random.fork_rng(devices=[device] if is_cuda else []):
            plan = build_plan(request) if state.engine == SINGLE else request_plan(request)
    except Exception as error:  # a mistake of the prediction must not end a run that has its results
        return RecordedPlan(reason=f"the prediction failed: {type(error).__name__}: {error}")
    if isinstance(plan, UnplannedRun):
        return RecordedPlan(reason=plan.reason)
    facts = get_facts_by_torch_name(device_name) if is_cuda else get_device_facts("cpu")
    return RecordedPlan(predicted=_select_training(plan, rows, facts.torch_name))


def _select_training(plan: Plan, rows: _Rows, device_profile: str) -> PlannedMemory:
    """Return the part of a plan that is about the training."""
    phases = {name: peak for name, peak in plan.phase_peaks.items() if name not in EVALUATION_PHASES}
    peak_phase = max(phases, key=lambda name: phases[name].allocated_bytes)
    return PlannedMemory(
        device_profile=device_profile,
        step=rows.step,
        micro_batch_size=plan.micro_batch_size,
        sequence_length=plan.sequence_length,
        labeled_tokens=rows.labeled_tokens,
        measured_positions=rows.positions,
        peak_phase=peak_phase,
        live_bytes=max(peak.live_bytes for peak in phases.values()),
        allocated_bytes=phases[peak_phase].allocated_bytes,
        reserved_bytes=plan.reserved_bytes,
        process_bytes=plan.process_bytes,
    )
