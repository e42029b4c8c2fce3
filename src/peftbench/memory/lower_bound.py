"""A lower bound of a recipe's memory from its tensors' sizes alone, without a simulated step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftbench.memory.simulation.step import MemorySimulation

if TYPE_CHECKING:
    from peftbench.memory.launch_config import LaunchConfig
    from peftbench.recipe.schema import Recipe

_cached_bounds: dict[tuple[str, ...], int] = {}


def compute_lower_bound(recipe: Recipe, launch_config: LaunchConfig) -> int:
    """Return the bytes of weights, gradients and optimizer states that training keeps whatever the micro-batch.

    Paged states, and everything of an engine that shards or offloads, count as zero.

    Raises:
        ModelError: the architecture is unknown, or the method does not support it.
    """
    if launch_config.engine.is_deepspeed or launch_config.engine.is_fsdp:
        return 0
    key = tuple(part.model_dump_json() for part in (recipe.model, recipe.method, recipe.optimizer))
    if key not in _cached_bounds:
        _cached_bounds[key] = _sum_state_bytes(recipe)
    return _cached_bounds[key]


def _sum_state_bytes(recipe: Recipe) -> int:
    unpaged = recipe.model_copy(update={"optimizer": recipe.optimizer.without_paging()})
    model = MemorySimulation(unpaged, "cuda", num_micro_batches=1).model
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    weights = sum({storage._cdata: storage.nbytes() for storage in storages}.values())  # tied weights count once
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    # States of projected matrices are smaller, and depend on the groups of a built optimizer.
    has_known_states = not (recipe.optimizer.is_paged or recipe.optimizer.needs_matrices)
    states = (recipe.optimizer.state_bytes([{"params": trained}]) or 0) if has_known_states else 0
    return weights + gradients + states
