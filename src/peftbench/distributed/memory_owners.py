"""Classifies the buffers that a distributed engine holds in addition to the model's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftbench.distributed import deepspeed
from peftbench.profiler.memory import iter_tensors
from peftbench.profiler.memory_breakdown import EngineBuffers, MemoryCategory

if TYPE_CHECKING:
    from collections.abc import Iterable

_ZERO_BUFFER_ATTRIBUTES: dict[str, MemoryCategory] = {
    "single_partition_of_fp32_groups": "optimizer_state",
    "fp32_partitioned_groups_flat": "optimizer_state",
    "bit16_groups_flat": "weights",
    "lp_param_buffer": "weights",
    "grad_partitions_flat_buffer": "gradients",
    "averaged_gradients": "gradients",
    "grads_in_partition": "gradients",
    "temp_grad_buffer_for_gpu_offload": "buckets",
}
"""Attributes of ZeRO's optimizers (stages 1 to 3) and what they hold."""


def collect_engine_buffers(
    prepared_model: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer
) -> EngineBuffers:
    """Return the buffers between two steps of the engine that wraps ``model`` as ``prepared_model``."""
    layers = list(deepspeed.unwrap_chain(optimizer))

    def collect_zero_buffers() -> list[tuple[MemoryCategory, torch.Tensor]]:
        return [buffer for layer in layers for buffer in _iter_zero_buffers(layer)]

    buffers = EngineBuffers(collect_zero_buffers(), inner_optimizer=layers[-1], refresh=collect_zero_buffers)
    for parameter in model.parameters():
        if (shard := getattr(parameter, "ds_tensor", None)) is not None:
            buffers.tensors.append(("weights", shard))
    buffers.gathered += _iter_gathered_parameters(model)
    buffers.untracked_bytes += _iter_ddp_buckets(prepared_model)
    return buffers


def _iter_zero_buffers(optimizer: object) -> Iterator[tuple[MemoryCategory, torch.Tensor]]:
    for name, category in _ZERO_BUFFER_ATTRIBUTES.items():
        yield from ((category, tensor) for tensor in iter_tensors(_flatten([getattr(optimizer, name, None)])))
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        yield from (("buckets", tensor) for tensor in iter_tensors([bucket.buffer]))


def _flatten(values: Iterable[Any]) -> Iterator[object]:
    for value in values:
        if isinstance(value, dict):
            yield from _flatten(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _flatten(value)
        else:
            yield value


def _iter_gathered_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the full parameters that fully_shard gathers while a layer runs.

    Each is the same object throughout; its memory is allocated and freed.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from (
                    full for p in group.fsdp_params if (full := getattr(p, "_unsharded_param", None)) is not None
                )


def _iter_ddp_buckets(prepared_model: nn.Module) -> Iterator[tuple[MemoryCategory, int]]:
    """Yield the sizes of the flat gradient copies that DDP's reducer all-reduces, which Python cannot see.

    The reducer rebuilds them in the forward pass after the first step; allocations from then on are tracked.
    """
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(prepared_model, DistributedDataParallel):
        logging_data = prepared_model._get_ddp_logging_data()
        if logging_data.get("has_rebuilt_buckets"):
            yield "buckets", sum(int(size) for size in str(logging_data["rebuilt_bucket_sizes"]).split(","))
