"""A DeepSpeed accelerator for torch's meta device: buffers are created there and no values are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

if TYPE_CHECKING:
    from peftbench.memory.simulation.device import DeviceEmulation, DeviceType


class MetaAccelerator(CPU_Accelerator):  # type: ignore[misc]
    """DeepSpeed's CPU accelerator on the meta device; for CUDA it reports asynchronous execution."""

    def __init__(self, device_type: DeviceType) -> None:
        super().__init__()
        self._name = "meta"
        self._is_cuda = device_type == "cuda"
        self._communication_backend_name = "nccl" if self._is_cuda else "gloo"

    def is_synchronized_device(self) -> bool:
        return not self._is_cuda

    def device_name(self, device_index: int | None = None) -> str:
        return "meta"

    def current_device_name(self) -> str:
        return "meta"

    def current_device(self) -> str:
        return "meta"

    def device_count(self) -> int:
        return 1

    @property
    def Stream(self) -> Any:
        return _Stream

    @property
    def Event(self) -> Any:
        return _Event

    def current_stream(self, device_index: int | None = None) -> Any:
        return _Stream()

    def default_stream(self, device_index: int | None = None) -> Any:
        return _Stream()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    def is_fp16_supported(self) -> bool:
        return True

    def create_op_builder(self, op_name: str) -> Any:
        return None  # no op is compiled


class _Stream:
    """A stream whose work is always finished."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def synchronize(self) -> None:
        """Do nothing."""

    def wait_stream(self, _: object) -> None:
        """Do nothing."""

    def wait_event(self, _: object) -> None:
        """Do nothing."""

    def record_event(self, *_: object) -> _Event:
        """Return a finished event."""
        return _Event()


class _Event:
    """An event that is always finished."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self, *_: object) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def wait(self, *_: object) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True."""
        return True


@contextmanager
def use_meta_accelerator(emulation: DeviceEmulation) -> Iterator[None]:
    """Make the meta device DeepSpeed's accelerator, with the autocast of ``emulation``."""
    from deepspeed import comm
    from deepspeed.runtime.zero import linear
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.utils import groups

    autocast = torch.autocast

    def emulated_autocast(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
        if device_type != "meta":
            return autocast(device_type, *args, **(kwargs | {"enabled": enabled}))
        return emulation.recompute() if enabled else nullcontext()

    with (
        _restore_globals(groups),
        _restore_globals(comm.comm),
        patch.object(real_accelerator, "ds_accelerator", MetaAccelerator(emulation.device_type)),
        patch.object(comm.comm, "cdb", None),
        patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda _: None),  # no other rank exists
        patch.object(torch, "autocast", emulated_autocast),
        patch.object(linear, "_is_autocast_enabled", lambda _: emulation.is_autocast_enabled),
        patch.object(linear, "_get_autocast_dtype", lambda _: emulation.autocast_dtype),
        patch.object(torch.Tensor, "record_stream", lambda *_: None),
        patch.object(torch.nn.functional, "linear", torch.nn.functional.linear),  # stage 3 replaces it permanently
    ):
        yield


@contextmanager
def _restore_globals(module: ModuleType) -> Iterator[None]:
    """Restore a module's global variables, in which DeepSpeed keeps its process groups."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)
