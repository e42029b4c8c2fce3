"""Record the operations of calls on the meta device, and short simulated steps."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peftbench.memory.devices import get_device_facts
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.recipe.schema import Recipe
from peftbench.timing.operations import Operation, OperationCounts, OperationLog

ROWS, TOKENS, LABELS = 4, 48, 5


def log_operations(run: Callable[[], object], part: str = "forward") -> OperationCounts:
    """Return the counts of the operations of ``run``."""
    log = OperationLog(lambda: part)
    with log:
        run()
    return log.count_step(1)


def log_one(run: Callable[[], object], part: str = "forward") -> Operation:
    """Return the only operation of ``run`` besides views and allocations."""
    (operation,) = [operation for operation in log_operations(run, part) if operation.kind != "metadata"]
    return operation


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor on the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def simulate(recipe: Recipe, device: str = "cpu", accumulation: int = 1) -> MemorySimulation:
    """Return the simulation of a step of small rows."""
    with MemorySimulation(recipe, get_device_facts(device).capability, accumulation) as simulation:
        simulation.simulate_training(ROWS, TOKENS, LABELS)
    return simulation
