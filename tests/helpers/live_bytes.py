"""A trace of live bytes that is independent of the package's own tracker."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages on a device, and their peak."""

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.live = self.peak = 0
        self.watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage, if it is new, until it is released."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.watches or tensor.device.type != self.device_type:
            return
        self.watches[storage._cdata] = weakref.ref(storage, partial(self._remove, storage._cdata, storage.nbytes()))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int, _: object) -> None:
        del self.watches[key]
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result
