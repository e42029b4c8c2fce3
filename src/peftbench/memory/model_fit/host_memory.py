"""CPU memory of the state that DeepSpeed offloads in full fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftbench.memory.launch_config import LaunchConfig
    from peftbench.recipe.schema import Recipe

_FP32_COPIES = {"zero2_offload": 6, "zero3_offload": 6}
"""float32 values in CPU memory per trained parameter, over steps of several micro-batches.

Both: master weight, its gradient, two moments. ZeRO-2: the flat weights before they are copied to the GPU, and the
gradient that is accumulated. ZeRO-3: the partitioned weight, and its gradient.
"""


def compute_host_bytes(recipe: Recipe, launch_config: LaunchConfig, parameters: int) -> int | None:
    """Return the bytes of offloaded state of full fine-tuning in one process; None for other runs, or without offload.

    Python, its libraries and buffers of the size of one matrix are not included.
    """
    copies = _FP32_COPIES.get(launch_config.engine.name)
    if copies is None or launch_config.num_processes > 1 or recipe.method.freezes_weights:
        return None
    return 4 * copies * parameters
