"""Activations kept in the CPU's memory between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

MIN_OFFLOAD_BYTES = 2**20
"""Bytes below which a tensor stays: moving it would take longer than it is worth."""


@dataclass(frozen=True)
class _OffloadedTensor:
    tensor: torch.Tensor
    device: torch.device


class ActivationOffload(saved_tensors_hooks):
    """Moves what autograd keeps to pinned memory of the CPU, and back when the backward pass wants it.

    Unlike torch's ``save_on_cpu`` it leaves alone weights, which stay on the device anyway, and small tensors. Copies
    that autocast makes of weights are moved like activations. ``device`` is the kind of device that they leave.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device_type: str = "cuda") -> None:
        self._device_type = device_type
        self._parameter_storages = {parameter.untyped_storage()._cdata for parameter in parameters}
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _OffloadedTensor:
        size = tensor.numel() * tensor.element_size()
        if (
            tensor.device.type != self._device_type
            or size < MIN_OFFLOAD_BYTES
            or tensor.untyped_storage()._cdata in self._parameter_storages
        ):
            return tensor
        moved = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        moved.copy_(tensor, non_blocking=True)
        return _OffloadedTensor(moved, tensor.device)


def _unpack(packed: torch.Tensor | _OffloadedTensor) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    return packed.tensor.to(packed.device, non_blocking=True)
