"""Peak memory of a stretch of a run, exact and without polling."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from peftbench.record import Memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): sets the peak resident set size to the current one


class Meter(Protocol):
    """Measures from each ``start`` to the ``read`` after it."""

    def start(self) -> None:
        """Forget the peak so far."""

    def read(self) -> Memory:
        """Peaks since ``start``, in bytes."""


class CudaMeter:
    """Peaks of torch's caching allocator on one device: bytes in tensors, and bytes held for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> Memory:
        return Memory(
            allocated_bytes=torch.cuda.max_memory_allocated(self.device),
            reserved_bytes=torch.cuda.max_memory_reserved(self.device),
        )


class ProcessMeter:
    """Peak resident set size of this process, and what was resident when the meter was made (None off Linux)."""

    def __init__(self) -> None:
        _give_back_freed_pages()
        self._baseline = _status("VmRSS")
        self._told = False

    def start(self) -> None:
        _give_back_freed_pages()
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
            self._told = True
        except OSError:  # not Linux, or not allowed
            self._told = False

    def read(self) -> Memory:
        if not self._told:
            return Memory()
        return Memory(resident_bytes=_status("VmHWM"), resident_baseline_bytes=self._baseline)


def meter_for(device: torch.device) -> Meter:
    """The meter of a device's memory."""
    return CudaMeter(device) if device.type == "cuda" else ProcessMeter()


def larger(first: Memory | None, second: Memory) -> Memory:
    """The larger peaks of two stretches, field by field."""
    if first is None:
        return second
    resident = max(first, second, key=lambda memory: memory.resident_bytes or -1)
    return resident.model_copy(
        update={
            name: max((v for m in (first, second) if (v := getattr(m, name)) is not None), default=None)
            for name in ("allocated_bytes", "reserved_bytes")
        }
    )


def largest(first: dict[str, Memory], second: dict[str, Memory]) -> dict[str, Memory]:
    """The larger peaks of two processes, phase by phase."""
    return first | {phase: larger(first.get(phase), memory) for phase, memory in second.items()}


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
