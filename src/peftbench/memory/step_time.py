"""Predict the time of an optimizer step of a recipe on a device, from its simulated operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftbench.distributed.engines import SINGLE, EngineKind
from peftbench.timing.roofline import StepSize, predict_step_time
from peftbench.timing.speeds import MissingSpeedError

if TYPE_CHECKING:
    from peftbench.memory.devices import DeviceFacts
    from peftbench.recipe.schema import Recipe
    from peftbench.timing.operations import OperationCounts
    from peftbench.timing.prediction import StepTime


def predict_time(
    counts: OperationCounts, recipe: Recipe, facts: DeviceFacts, sequence_length: int, engine: EngineKind = SINGLE
) -> tuple[StepTime | None, tuple[str, ...]]:
    """Return the time of a step with these operations, and notes for the plan; None without speeds."""
    speeds = facts.speeds
    if speeds is None:
        return None, ()
    offloads = engine.offload_optimizer != "none" or engine.offload_parameters != "none"
    if facts.device_type == "cuda" and (offloads or recipe.optimizer.is_paged or recipe.train.activation_offloading):
        return None, ("no time is predicted: transfers to host memory and work on the CPU are not modeled",)
    examples = recipe.train.global_batch_size
    try:
        return predict_step_time(counts, speeds, StepSize(examples, examples * sequence_length)), ()
    except MissingSpeedError as error:
        return None, (f"no time is predicted: {error}",)
