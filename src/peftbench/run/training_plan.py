"""Predict the memory of a finished training, for the rows that it had."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from peftbench.data.collate import PaddingFreeCollator
from peftbench.distributed.engines import SINGLE
from peftbench.memory.advisor import AdviceRequest, build_plan, request_plan
from peftbench.memory.devices import get_device_facts, get_facts_by_torch_name
from peftbench.memory.plan import Plan, UnplannedRun
from peftbench.memory.search import with_evaluation_batch
from peftbench.record import PlannedMemory, RecordedPlan

if TYPE_CHECKING:
    from peftbench.data.batches import Batches
    from peftbench.recipe.schema import Recipe
    from peftbench.run.state import RunState

_EVALUATION_PHASES = frozenset({"evaluate", "generate"})


def plan_training(state: RunState) -> RecordedPlan:
    """Return the predicted memory of the training on rank 0 for this run's device, or why there is none.

    The prediction runs in this process, or in one of its own if this process has an engine's process group. It leaves
    the state of torch's random numbers as it was.
    """
    device, labels = state.accelerator.device, _count_labels_per_row(state)
    is_cuda = device.type == "cuda"
    device_name = torch.cuda.get_device_properties(device).name if is_cuda else "cpu"
    request = AdviceRequest.from_environment(_with_rows_of_run(state), None, device_name, labeled_tokens=labels)
    try:
        with torch.random.fork_rng(devices=[device] if is_cuda else []):
            plan = build_plan(request) if state.engine == SINGLE else request_plan(request)
    except Exception as error:  # a mistake of the prediction must not end a run that has its results
        return RecordedPlan(reason=f"the prediction failed: {type(error).__name__}: {error}")
    if isinstance(plan, UnplannedRun):
        return RecordedPlan(reason=plan.reason)
    facts = get_facts_by_torch_name(device_name) if is_cuda else get_device_facts("cpu")
    return RecordedPlan(predicted=_select_training(plan, state, facts.torch_name, labels))


def _select_training(plan: Plan, state: RunState, device_profile: str, labels: int | None) -> PlannedMemory:
    """Return the part of a plan that is about the training."""
    phases = {name: peak for name, peak in plan.phase_peaks.items() if name not in _EVALUATION_PHASES}
    peak_phase = max(phases, key=lambda name: phases[name].allocated_bytes)
    rows, width = _find_largest_shape(state)
    return PlannedMemory(
        device_profile=device_profile,
        micro_batch_size=plan.micro_batch_size,
        sequence_length=plan.sequence_length,
        labeled_tokens=labels,
        measured_positions=rows * width,
        peak_phase=peak_phase,
        live_bytes=max(peak.live_bytes for peak in phases.values()),
        allocated_bytes=phases[peak_phase].allocated_bytes,
        reserved_bytes=plan.reserved_bytes,
        process_bytes=plan.process_bytes,
    )


def _find_largest_shape(state: RunState) -> tuple[int, int]:
    """Return the most rows and the most positions of a row in any micro-batch of this rank."""
    shapes = state.progress.step_shapes
    return max(rows for rows, _ in shapes), max(width for _, width in shapes)


def _count_labels_per_row(state: RunState) -> int | None:
    """Return the labeled tokens of a row if those of the fullest micro-batch are spread over its rows.

    None if they are not known for every step, or the rows are not.
    """
    assert state.training is not None
    rows = state.training.batches.max_micro_batch_size
    counts = state.progress.step_max_labeled
    if rows is None or len(counts) < state.progress.completed_steps:
        return None
    return math.ceil(max(counts) / rows)


def _with_rows_of_run(state: RunState) -> Recipe:
    """Return the recipe with rows as long as those of the run, and as little evaluation as a plan allows."""
    assert state.training is not None
    recipe = state.recipe
    width = _find_row_length(state.training.batches, state)
    data = recipe.data if width is None else recipe.data.model_copy(update={"max_length": width})
    evaluate = recipe.evaluate.model_copy(update={"metrics": (), "max_new_tokens": 1})
    return with_evaluation_batch(recipe.model_copy(update={"data": data, "evaluate": evaluate}), 1)


def _find_row_length(batches: Batches, state: RunState) -> int | None:
    """Return the length of rows that fill the run's largest micro-batch; None if its rows are not known.

    A packed micro-batch is one row of all examples, with their virtual tokens.
    """
    _, width = _find_largest_shape(state)
    if not isinstance(batches.collator, PaddingFreeCollator):
        return width
    rows = batches.max_micro_batch_size
    return None if rows is None else math.ceil(width / rows) - batches.collator.virtual_tokens
