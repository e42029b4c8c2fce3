"""A lower bound of a recipe's memory from its tensors' sizes alone, without a simulated step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.memory.devices import UNKNOWN_DEVICE
from peftbench.memory.simulation.step import MemorySimulation

if TYPE_CHECKING:
    from peftbench.memory.launch_config import LaunchConfig
    from peftbench.recipe.schema import Recipe


@dataclass(frozen=True)
class TensorSizes:
    """Bytes of the tensors that training keeps whatever the micro-batch."""

    weight_bytes: int
    """Weights and buffers, trained or frozen; tied weights count once."""
    trained_bytes: int
    """Trained weights; their gradients have the same size."""
    state_bytes: int
    """Optimizer states; 0 if they are paged, or if their size depends on a built optimizer."""


_sizes_by_key: dict[tuple[str, ...], TensorSizes] = {}


def compute_lower_bound(recipe: Recipe, launch_config: LaunchConfig) -> int:
    """Return the bytes of weights, gradients and optimizer states of one process.

    Zero for an engine that shards or offloads.

    Raises:
        ModelError: the architecture is unknown, or the method does not support it.
    """
    if launch_config.engine.is_deepspeed or launch_config.engine.is_fsdp:
        return 0
    sizes = measure_tensors(recipe)
    return sizes.weight_bytes + sizes.trained_bytes + sizes.state_bytes


def measure_tensors(recipe: Recipe) -> TensorSizes:
    """Return the sizes of the model's tensors and of its optimizer states, without a simulated step.

    Raises:
        ModelError: the architecture is unknown, or the method does not support it.
    """
    key = (recipe.frozen_dtype, *(part.model_dump_json() for part in (recipe.model, recipe.method, recipe.optimizer)))
    if key not in _sizes_by_key:
        _sizes_by_key[key] = _measure(recipe)
    return _sizes_by_key[key]


def _measure(recipe: Recipe) -> TensorSizes:
    simulated = recipe.model_copy(update={"optimizer": recipe.optimizer.to_simulated()})
    model = MemorySimulation(simulated, UNKNOWN_DEVICE.capability, num_micro_batches=1).model
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    # States of projected matrices are smaller, and depend on the groups of a built optimizer.
    has_known_states = not (recipe.optimizer.is_paged or recipe.optimizer.needs_matrices)
    with recipe.optimizer.first_step(model, recipe.train.seed):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return TensorSizes(
            weight_bytes=sum({storage._cdata: storage.nbytes() for storage in storages}.values()),
            trained_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trained),
            state_bytes=(recipe.optimizer.state_bytes([{"params": trained}]) or 0) if has_known_states else 0,
        )
