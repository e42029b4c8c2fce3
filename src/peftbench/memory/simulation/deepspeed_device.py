"""DeepSpeed's idea of a device, for torch's meta device: it makes its buffers there, and asks it for no values."""

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
    """The CPU's, with another name; or as CUDA's in whether work is done when a call returns."""

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
        return None  # nothing is compiled


class _Stream:
    """All is done when a call returns."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing is waited for."""

    def wait_stream(self, _: object) -> None:
        """Nothing is waited for."""

    def wait_event(self, _: object) -> None:
        """Nothing is waited for."""

    def record_event(self, *_: object) -> _Event:
        """What has happened."""
        return _Event()


class _Event:
    """Has always happened."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self, *_: object) -> None:
        """Nothing is waited for."""

    def synchronize(self) -> None:
        """Nothing is waited for."""

    def wait(self, *_: object) -> None:
        """Nothing is waited for."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True


@contextmanager
def use_meta_accelerator(emulation: DeviceEmulation) -> Iterator[None]:
    """Have DeepSpeed take the meta device for its accelerator, with ``steering``'s casts."""
    from deepspeed import comm
    from deepspeed.runtime.zero import linear
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.utils import groups

    autocast = torch.autocast

    def autocast_there(device_type: str, *given: Any, enabled: bool = True, **named: Any) -> Any:
        if device_type != "meta":
            return autocast(device_type, *given, **(named | {"enabled": enabled}))
        return emulation.recompute() if enabled else nullcontext()

    with (
        _restore_globals(groups),
        _restore_globals(comm.comm),
        patch.object(real_accelerator, "ds_accelerator", MetaAccelerator(emulation.device_type)),
        patch.object(comm.comm, "cdb", None),
        patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda _: None),  # they are not there to be asked
        patch.object(torch, "autocast", autocast_there),
        patch.object(linear, "_is_autocast_enabled", lambda _: emulation.is_autocast_enabled),
        patch.object(linear, "_get_autocast_dtype", lambda _: emulation.autocast_dtype),
        patch.object(torch.Tensor, "record_stream", lambda *_: None),
        patch.object(torch.nn.functional, "linear", torch.nn.functional.linear),  # which stage 3 replaces for good
    ):
        yield


@contextmanager
def _restore_globals(module: ModuleType) -> Iterator[None]:
    """Put back what a module keeps of the processes it found, in variables of its own."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)
