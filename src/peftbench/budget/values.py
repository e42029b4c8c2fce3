"""Answers for the values that engines ask of tensors on the meta device, where any will do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NUMBER = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten.copy_.default
_MOVE = torch.ops.aten._to_copy.default


class MadeUpValues(TorchDispatchMode):
    """Makes up numbers that an engine reads, and leaves unwritten what it copies to the CPU.

    An engine looks at a gradient's norm, say, and steps or does not; it is told 1, and that nothing overflowed. Off
    while the model's own code runs, where a number can change a size.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):  # first what it comes to on this process's part
            return NotImplemented
        kwargs = kwargs or {}
        if self.on and func is _NUMBER and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is _COPY and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if func is _MOVE and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.empty_like(args[0], device="cpu", dtype=kwargs.get("dtype"))
        return func(*args, **kwargs)
