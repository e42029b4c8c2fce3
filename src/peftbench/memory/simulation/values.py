"""Fake values for engines that read meta tensors where the value does not matter."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ATEN = torch.ops.aten
_FILL_OPS = {_ATEN.zeros.default, _ATEN.ones.default, _ATEN.full.default, _ATEN.empty.memory_format}
_MIN_SKIPPED_NUMEL = 2**16
"""CPU tensors with fewer elements are computed: counts, tokens, a norm."""
_MAP_NORESERVE = 0x4000
"""Flag of Linux that the kernel checks no limit of memory for the mapping; Python's ``mmap`` has it from 3.13 on."""


class FakeScalars(TorchDispatchMode):
    """Returns fake values for scalars that an engine reads, and skips computation on large CPU tensors.

    An engine reads the gradient norm, for example, to decide whether to step: it gets 1 and no overflow. Disabled while
    the model's own code runs, where a value can change a size. Offloaded tensors are allocated and never written, so
    that they take address space but no memory, however large they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_enabled = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):  # DTensor first dispatches to the local shard
            return NotImplemented
        kwargs = kwargs or {}
        if self.is_enabled and func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is _ATEN.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if kwargs.get("device") == torch.device("cpu") and (tensor := _allocate_result(func, args, kwargs)) is not None:
            return tensor
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(_is_large_cpu_tensor(tensor) for tensor in tensors) and not any(tensor.is_meta for tensor in tensors):
            return _allocate_outputs(func, args, kwargs)
        return func(*args, **kwargs)


def _allocate_result(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """Return the CPU tensor that an operation fills or copies from the meta device; None for other operations."""
    dtype = kwargs.get("dtype")
    if func is _ATEN._to_copy.default and args[0].is_meta:
        return _allocate(args[0].size(), args[0].stride(), dtype or args[0].dtype)
    if func in _FILL_OPS and math.prod(args[0]) >= _MIN_SKIPPED_NUMEL:
        return _allocate_like(torch.empty(args[0], dtype=dtype, device="meta"))  # type: ignore[no-any-return]
    return None


def _is_large_cpu_tensor(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() >= _MIN_SKIPPED_NUMEL


def _allocate_outputs(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the outputs of a CPU operation with uninitialized memory."""
    if func._schema.is_mutable:
        output = kwargs["out"] if "out" in kwargs else args[0]
        return output if func._schema.returns else None
    is_view = any(value.alias_info is not None for value in func._schema.returns)
    if is_view or kwargs.get("device", torch.device("cpu")) != torch.device("cpu"):
        return func(*args, **kwargs)
    args, kwargs = tree_map(_to_meta, (args, kwargs))
    return tree_map(_allocate_like, func(*args, **kwargs))


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _allocate_like(value: Any) -> Any:
    return _allocate(value.size(), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def _allocate(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialized CPU tensor; a large one is a mapping for which the kernel reserves no memory.

    The sum of such tensors may exceed the machine's memory, since they are never written.
    """
    numel = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if 0 not in size else 0
    if numel < _MIN_SKIPPED_NUMEL or sys.platform != "linux":
        return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, numel * dtype.itemsize, flags=flags)
    except OSError:  # vm.overcommit_memory=2 ignores the flag; torch raises an error that a plan explains
        return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype).as_strided(tuple(size), tuple(stride))
