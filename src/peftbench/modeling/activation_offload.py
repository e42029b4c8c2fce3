"""Offload activations to CPU memory between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

MIN_OFFLOAD_BYTES = 2**20
"""Smaller tensors stay on the device: the copy would cost more time than the memory is worth."""


@dataclass(frozen=True)
class _OffloadedTensor:
    tensor: torch.Tensor
    device: torch.device


class ActivationOffload(saved_tensors_hooks):
    """Moves tensors that autograd saves to pinned CPU memory, and back when the backward pass needs them.

    Unlike torch's ``save_on_cpu``, it skips weights, which stay on the device anyway, and small tensors. Autocast's
    copies of weights are moved like activations. ``device_type`` is the type of the device to offload from.
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
        host_copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host_copy.copy_(tensor, non_blocking=True)
        return _OffloadedTensor(host_copy, tensor.device)


def _unpack(packed: torch.Tensor | _OffloadedTensor) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    return packed.tensor.to(packed.device, non_blocking=True)
