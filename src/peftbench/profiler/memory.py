"""Measure peak memory of a section of a run, exactly and without polling."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from peftbench.profiler.nvml import Gpu
from peftbench.record import Memory

_PEAK_FIELDS = ("allocated_bytes", "reserved_bytes", "inactive_split_bytes", "process_bytes")
_PROC_STATUS = Path("/proc/self/status")
_PROC_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK_RSS = "5"  # proc_pid_clear_refs(5): sets the peak resident set size to the current one


class MemoryMeter(Protocol):
    """Measures consecutive laps: the end of one is the start of the next."""

    supports_step_parts: bool
    """True if a lap is cheap enough for each part of a step."""
    cuda_context_bytes: int | None
    """Device memory of the process before its first tensor, None if unknown."""

    def lap(self, *, within_steps: bool = False) -> Memory:
        """Return the peaks since the previous lap, in bytes.

        ``within_steps`` is True between two steps: freed pages are not returned to the system, since the next step
        reuses them.
        """

    def read_process_bytes(self) -> int | None:
        """Return the device memory of the process now."""

    def read_in_use_bytes(self) -> int | None:
        """Return the run's memory now, if it is cheap to read; this ends no lap."""

    def empty_cache(self) -> None:
        """Release cached memory, so that it does not count in later peaks."""

    def set_baseline(self) -> None:
        """Exclude the process's current memory, before anything is loaded, from the run's memory."""


class CudaMemoryMeter:
    """Peaks of torch's caching allocator on one device, from its own counters; needs no synchronization."""

    supports_step_parts = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda_context_bytes: int | None = _measure_cuda_context_bytes(device)
        self.gpu = Gpu.from_device(device)
        self._last_num_alloc_retries: int | None = None
        self.lap()

    def lap(self, *, within_steps: bool = False) -> Memory:
        # The flat form (memory_stats) takes ten times as long.
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before, self._last_num_alloc_retries = self._last_num_alloc_retries, stats.get("num_alloc_retries")
        return Memory(
            allocated_bytes=_get_peak(stats, "allocated_bytes"),
            reserved_bytes=_get_peak(stats, "reserved_bytes"),
            inactive_split_bytes=_get_peak(stats, "inactive_split_bytes"),
            num_alloc_retries=None
            if before is None or self._last_num_alloc_retries is None
            else self._last_num_alloc_retries - before,
        )

    def read_process_bytes(self) -> int | None:
        return self.gpu.read_process_bytes() if self.gpu else None

    def read_in_use_bytes(self) -> int | None:
        return read_reserved_bytes(self.device) + (self.cuda_context_bytes or 0)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def set_baseline(self) -> None:
        """Do nothing: the counters start at zero."""


def read_reserved_bytes(device: torch.device) -> int:
    """Return the bytes that torch's allocator has reserved on a GPU, including its cache."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return int(stats["reserved_bytes"]["all"]["current"])


@cache
def _measure_cuda_context_bytes(device: torch.device) -> int | None:
    """Measure the GPU memory of this process outside of torch's allocator, once per device."""
    torch.cuda.synchronize(device)  # creates the context if there is none
    gpu = Gpu.from_device(device)
    in_use = gpu.read_process_bytes() if gpu else None
    return None if in_use is None else in_use - torch.cuda.memory_reserved(device)


def _get_peak(stats: dict[str, dict[str, dict[str, int]]], name: str) -> int | None:
    return stats[name]["all"]["peak"] if name in stats else None


class RssMeter:
    """Peak resident set size (RSS) of this process, and the RSS at the baseline; None except on Linux."""

    supports_step_parts = False
    cuda_context_bytes: int | None = None

    def __init__(self) -> None:
        self._baseline_bytes: int | None = None
        self._can_reset_peak = False
        self.set_baseline()

    def set_baseline(self) -> None:
        gc.collect()  # garbage freed during the run would falsify the baseline
        _release_freed_pages()
        self._baseline_bytes = read_proc_status_bytes("VmRSS")
        self.lap()

    def lap(self, *, within_steps: bool = False) -> Memory:
        peak = Memory()
        if self._can_reset_peak:
            peak = Memory(rss_bytes=read_proc_status_bytes("VmHWM"), baseline_rss_bytes=self._baseline_bytes)
        if not within_steps:
            _release_freed_pages()
        try:
            _PROC_CLEAR_REFS.write_text(_RESET_PEAK_RSS, encoding="ascii")
            self._can_reset_peak = True
        except OSError:  # not Linux, or no permission
            self._can_reset_peak = False
        return peak

    def read_process_bytes(self) -> int | None:
        return None

    def read_in_use_bytes(self) -> int | None:
        resident = read_proc_status_bytes("VmRSS")
        return None if resident is None or self._baseline_bytes is None else max(0, resident - self._baseline_bytes)

    def empty_cache(self) -> None:
        """Do nothing: each lap returns freed pages to the system."""


def build_memory_meter(device: torch.device) -> MemoryMeter:
    """Return the memory meter for ``device``."""
    return CudaMemoryMeter(device) if device.type == "cuda" else RssMeter()


def max_memory(first: Memory | None, second: Memory) -> Memory:
    """Return the larger peak of two sections, field by field; retries are added."""
    if first is None:
        return second
    if _is_within(first, second):  # the common case, checked after every part of a step
        return first
    with_max_rss = max(first, second, key=lambda memory: memory.rss_bytes or -1)
    retries = [memory.num_alloc_retries for memory in (first, second) if memory.num_alloc_retries is not None]
    return with_max_rss.model_copy(
        update={
            name: max((v for m in (first, second) if (v := getattr(m, name)) is not None), default=None)
            for name in _PEAK_FIELDS
        }
        | {"num_alloc_retries": sum(retries) if retries else None}
    )


def _is_within(first: Memory, second: Memory) -> bool:
    if second.num_alloc_retries or (second.num_alloc_retries == 0 and first.num_alloc_retries is None):
        return False
    for name in (*_PEAK_FIELDS, "rss_bytes"):
        value, limit = getattr(second, name), getattr(first, name)
        if value is not None and (limit is None or value > limit):
            return False
    return True


def max_over_ranks(memory_by_rank: Sequence[dict[str, Memory]]) -> dict[str, Memory]:
    """Return the maximum of each value over ranks, phase by phase."""
    by_phase: dict[str, Memory] = {}
    for phase, memory in (item for rank in memory_by_rank for item in rank.items()):
        largest = max_memory(by_phase.get(phase), memory)
        retries = [
            m.num_alloc_retries for m in (by_phase.get(phase, memory), memory) if m.num_alloc_retries is not None
        ]
        by_phase[phase] = largest.model_copy(update={"num_alloc_retries": max(retries, default=None)})
    return by_phase


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a DTensor; return any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return,operator]


def iter_tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """Yield tensors in ``values``, including those in attributes of objects (e.g. a projection)."""
    for value in values:
        if hasattr(value, "to_local"):
            yield local_shard(value)  # type: ignore[arg-type]
        elif hasattr(value, "__tensor_flatten__"):  # a tensor subclass with inner tensors, e.g. torchao's 8-bit states
            yield from iter_tensors(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from iter_tensors(value)
        elif hasattr(value, "__dict__"):
            yield from iter_tensors(vars(value).values())


def count_storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the total bytes of the tensors' storages; a shared storage counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def read_proc_status_bytes(key: str) -> int | None:
    """Return a value of /proc/self/status in bytes; its unit "kB" means KiB."""
    try:
        lines = _PROC_STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _release_freed_pages() -> None:
    """Make glibc return free memory to the system, so that a peak starts at the memory in use."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
