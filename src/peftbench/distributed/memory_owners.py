"""What an engine keeps between two steps beside a model's parameters, and what of it is for what."""

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
"""Attributes of ZeRO's optimizers, stages 1 to 3."""


def collect_engine_buffers(
    prepared_model: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer
) -> EngineBuffers:
    """Of what an engine made of ``model`` (``started``) and of the optimizer (``optimizer``), between two steps."""
    layers = list(deepspeed.unwrap_chain(optimizer))

    def of_zero() -> list[tuple[MemoryCategory, torch.Tensor]]:
        return [held for layer in layers for held in _iter_zero_buffers(layer)]

    found = EngineBuffers(of_zero(), inner_optimizer=layers[-1], refresh=of_zero)
    for parameter in model.parameters():
        if (part := getattr(parameter, "ds_tensor", None)) is not None:
            found.tensors.append(("weights", part))
    found.gathered += _iter_gathered_parameters(model)
    found.untracked_bytes += _iter_ddp_buckets(prepared_model)
    return found


def _iter_zero_buffers(optimizer: object) -> Iterator[tuple[MemoryCategory, torch.Tensor]]:
    for name, kind in _ZERO_BUFFER_ATTRIBUTES.items():
        yield from ((kind, tensor) for tensor in iter_tensors(_flatten([getattr(optimizer, name, None)])))
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
    """Parameters that fully_shard makes whole for a layer's time; each is one object, with memory or without."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from (
                    whole for p in group.fsdp_params if (whole := getattr(p, "_unsharded_param", None)) is not None
                )


def _iter_ddp_buckets(prepared_model: nn.Module) -> Iterator[tuple[MemoryCategory, int]]:
    """Flat copies of the gradients to be sent, which DDP's reducer keeps where Python does not see them.

    It makes them anew in the forward pass after the first step; those are seen as they are made.
    """
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(prepared_model, DistributedDataParallel):
        said = prepared_model._get_ddp_logging_data()
        if said.get("has_rebuilt_buckets"):
            yield "buckets", sum(int(size) for size in str(said["rebuilt_bucket_sizes"]).split(","))
