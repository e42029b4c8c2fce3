"""Predict the time of an optimizer step of a recipe on a device, from its simulated operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftbench.timing.figures import MissingFigureError
from peftbench.timing.roofline import StepSize, predict_step_time

if TYPE_CHECKING:
    from peftbench.memory.devices import DeviceFacts
    from peftbench.memory.simulation.step import MemorySimulation
    from peftbench.timing.prediction import StepTime


def predict_time(
    simulation: MemorySimulation, facts: DeviceFacts, sequence_length: int
) -> tuple[StepTime | None, str | None]:
    """Return the time of the step that ``simulation`` ran, or None and the reason; both are None without figures."""
    figures = facts.figures
    if figures is None:
        return None, None
    examples = simulation.recipe.train.global_batch_size
    counts = simulation.operation_log.count_step(simulation.accumulation)
    try:
        return predict_step_time(counts, figures, StepSize(examples, examples * sequence_length)), None
    except MissingFigureError as error:
        return None, f"no time is predicted: {error}"
