"""Peak memory of a stretch of a run, exact and without polling."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from peftbench.profiler.nvml import Gpu
from peftbench.record import Memory, StateBytes

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): sets the peak resident set size to the current one


class Meter(Protocol):
    """Measures one lap after another: the end of one is the start of the next."""

    every_part: bool
    """Whether a lap costs so little that each part of a step can have its own."""
    context_bytes: int | None
    """What the process took of the device before it held a tensor."""

    def lap(self) -> Memory:
        """Peaks since the lap before, in bytes."""

    def process_bytes(self) -> int | None:
        """What the process holds of the device now."""


class CudaMeter:
    """Peaks of torch's caching allocator on one device, which its own counters know at no cost to the device."""

    every_part = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.context_bytes: int | None = None
        torch.cuda.synchronize(device)  # the context is made here, if it was not before
        self.gpu = Gpu.of(device)
        in_use = self.process_bytes()
        if in_use is not None:
            self.context_bytes = in_use - torch.cuda.memory_reserved(device)
        self._retries = 0
        self.lap()

    def lap(self) -> Memory:
        # The flat form of the same figures takes ten times as long to make.
        told = torch.cuda.memory_stats_as_nested_dict(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        retries, self._retries = told.get("num_alloc_retries", 0) - self._retries, told.get("num_alloc_retries", 0)
        return Memory(
            allocated_bytes=_peak(told, "allocated_bytes"),
            reserved_bytes=_peak(told, "reserved_bytes"),
            unusable_bytes=_peak(told, "inactive_split_bytes"),
            allocation_retries=retries,
        )

    def process_bytes(self) -> int | None:
        return self.gpu.process_bytes() if self.gpu else None


def _peak(told: dict[str, dict[str, dict[str, int]]], what: str) -> int:
    return told[what]["all"]["peak"] if what in told else 0


class ProcessMeter:
    """Peak resident set size of this process, and what was resident when the meter was made (None off Linux)."""

    every_part = False
    context_bytes: int | None = None

    def __init__(self) -> None:
        _give_back_freed_pages()
        self._baseline = _status("VmRSS")
        self._told = False
        self.lap()

    def lap(self) -> Memory:
        peak = Memory()
        if self._told:
            peak = Memory(resident_bytes=_status("VmHWM"), resident_baseline_bytes=self._baseline)
        _give_back_freed_pages()
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
            self._told = True
        except OSError:  # not Linux, or not allowed
            self._told = False
        return peak

    def process_bytes(self) -> int | None:
        return None


def meter_for(device: torch.device) -> Meter:
    """The meter of a device's memory."""
    return CudaMeter(device) if device.type == "cuda" else ProcessMeter()


def larger(first: Memory | None, second: Memory) -> Memory:
    """The larger peaks of two stretches, field by field; retries add up."""
    if first is None:
        return second
    resident = max(first, second, key=lambda memory: memory.resident_bytes or -1)
    peaks = ("allocated_bytes", "reserved_bytes", "unusable_bytes", "process_bytes")
    retries = [memory.allocation_retries for memory in (first, second) if memory.allocation_retries is not None]
    return resident.model_copy(
        update={
            name: max((v for m in (first, second) if (v := getattr(m, name)) is not None), default=None)
            for name in peaks
        }
        | {"allocation_retries": sum(retries) if retries else None}
    )


def largest(first: dict[str, Memory], second: dict[str, Memory]) -> dict[str, Memory]:
    """The larger peaks of two processes, phase by phase."""
    return first | {phase: larger(first.get(phase), memory) for phase, memory in second.items()}


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> StateBytes:
    """Bytes of what is kept from step to step: each storage once, and a gradient for each trained parameter."""
    held = [*model.parameters(), *model.buffers()]
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return StateBytes(
        weights=_distinct_bytes(held),
        gradients=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        optimizer=_distinct_bytes(states),
    )


def _distinct_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _status(key: str) -> int | None:
    """A figure of /proc/self/status in bytes; the file speaks of kibibytes and calls them kB."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _give_back_freed_pages() -> None:
    """Let glibc return what is free, so that a peak starts from what is in use."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
