"""CPU memory of the state that DeepSpeed offloads in full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftbench.memory.launch_config import LaunchConfig
    from peftbench.recipe.schema import Recipe

_FP32_BYTES = 4


@dataclass(frozen=True)
class _OffloadedCopies:
    """float32 values in CPU memory per trained parameter of a process's partition."""

    pinned_buffers: int
    """Values in page-locked buffers that each hold the whole partition."""
    other_values: int
    """Values in pageable memory, or in page-locked buffers of a part of the partition."""


_COPIES = {
    "zero2_offload": _OffloadedCopies(pinned_buffers=3, other_values=3),
    "zero3_offload": _OffloadedCopies(pinned_buffers=2, other_values=4),
}
"""Copies of each engine in steps of several micro-batches, by runtime/zero of DeepSpeed 0.19.

ZeRO-2 (stage_1_and_2.py) has three pinned buffers: master weights, their gradient, and the updated weights before they
are copied to the GPU. The others are two moments and the gradients that are accumulated, one buffer per parameter.
ZeRO-3 (stage3.py) has two: the partitioned weights and their gradients. The others are master weights, their gradient
by sub-groups, and two moments.
"""


def compute_host_bytes(recipe: Recipe, launch_config: LaunchConfig, parameters: int) -> int | None:
    """Return the CPU memory of the state that one process offloads in full fine-tuning; None for other runs.

    PyTorch rounds a page-locked buffer up to a power of two bytes. Rounding of small buffers, ZeRO-2's buffer of the
    largest parameter, Python and its libraries are not included.
    """
    copies = _COPIES.get(launch_config.engine.name)
    if copies is None or recipe.method.freezes_weights:
        return None
    partition = count_partition_bytes(parameters, launch_config.dp_world_size)
    return copies.pinned_buffers * _round_up_to_power_of_two(partition) + copies.other_values * partition


def compute_offloaded_bytes(engine: str, parameters: int, dp_world_size: int = 1) -> int:
    """Return the bytes of the tensors that one process offloads, without the allocator's rounding."""
    copies = _COPIES[engine]
    return (copies.pinned_buffers + copies.other_values) * count_partition_bytes(parameters, dp_world_size)


def count_partition_bytes(parameters: int, dp_world_size: int) -> int:
    """Return the bytes of one process's part of all parameters in float32."""
    return _FP32_BYTES * -(-parameters // dp_world_size)


def _round_up_to_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
