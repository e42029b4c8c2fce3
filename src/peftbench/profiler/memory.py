"""Peak memory of a stretch of a run, exact and without polling."""

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
    """Measures one lap after another: the end of one is the start of the next."""

    supports_step_parts: bool
    """Whether a lap costs so little that each part of a step can have its own."""
    cuda_context_bytes: int | None
    """What the process took of the device before it held a tensor."""

    def lap(self) -> Memory:
        """Peaks since the lap before, in bytes."""

    def read_process_bytes(self) -> int | None:
        """What the process holds of the device now."""

    def read_in_use_bytes(self) -> int | None:
        """What the run holds now, as far as it is known at next to no cost; no lap ends."""

    def empty_cache(self) -> None:
        """Give back what is held for no tensor, so that a later peak is of what comes later."""

    def set_baseline(self) -> None:
        """Count what the process holds now, before anything is loaded, to itself and not to the run."""


class CudaMemoryMeter:
    """Peaks of torch's caching allocator on one device, which its own counters know at no cost to the device."""

    supports_step_parts = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda_context_bytes: int | None = _measure_cuda_context_bytes(device)
        self.gpu = Gpu.from_device(device)
        self._last_num_alloc_retries: int | None = None
        self.lap()

    def lap(self) -> Memory:
        # The flat form of the same figures takes ten times as long to make.
        told = torch.cuda.memory_stats_as_nested_dict(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before, self._last_num_alloc_retries = self._last_num_alloc_retries, told.get("num_alloc_retries")
        return Memory(
            allocated_bytes=_get_peak(told, "allocated_bytes"),
            reserved_bytes=_get_peak(told, "reserved_bytes"),
            inactive_split_bytes=_get_peak(told, "inactive_split_bytes"),
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
        """Tensors are counted from none on."""


def read_reserved_bytes(device: torch.device) -> int:
    """What torch's allocator holds of a GPU now, its cache included."""
    told = torch.cuda.memory_stats_as_nested_dict(device)
    return int(told["reserved_bytes"]["all"]["current"])


@cache
def _measure_cuda_context_bytes(device: torch.device) -> int | None:
    """What this process holds of the GPU beside torch's tensors, when it is first asked."""
    torch.cuda.synchronize(device)  # the context is made here, if it was not before
    gpu = Gpu.from_device(device)
    in_use = gpu.read_process_bytes() if gpu else None
    return None if in_use is None else in_use - torch.cuda.memory_reserved(device)


def _get_peak(stats: dict[str, dict[str, dict[str, int]]], name: str) -> int | None:
    return stats[name]["all"]["peak"] if name in stats else None


class RssMeter:
    """Peak resident set size of this process, and what was resident when the meter was made (None off Linux)."""

    supports_step_parts = False
    cuda_context_bytes: int | None = None

    def __init__(self) -> None:
        self._baseline_bytes: int | None = None
        self._can_reset_peak = False
        self.set_baseline()

    def set_baseline(self) -> None:
        gc.collect()  # or cycles of before would be counted here, and be freed in the middle of the run
        _release_freed_pages()
        self._baseline_bytes = read_proc_status_bytes("VmRSS")
        self.lap()

    def lap(self) -> Memory:
        peak = Memory()
        if self._can_reset_peak:
            peak = Memory(rss_bytes=read_proc_status_bytes("VmHWM"), baseline_rss_bytes=self._baseline_bytes)
        _release_freed_pages()
        try:
            _PROC_CLEAR_REFS.write_text(_RESET_PEAK_RSS, encoding="ascii")
            self._can_reset_peak = True
        except OSError:  # not Linux, or not allowed
            self._can_reset_peak = False
        return peak

    def read_process_bytes(self) -> int | None:
        return None

    def read_in_use_bytes(self) -> int | None:
        resident = read_proc_status_bytes("VmRSS")
        return None if resident is None or self._baseline_bytes is None else max(0, resident - self._baseline_bytes)

    def empty_cache(self) -> None:
        """Each lap gives freed pages back already."""


def build_memory_meter(device: torch.device) -> MemoryMeter:
    """The meter of a device's memory."""
    return CudaMemoryMeter(device) if device.type == "cuda" else RssMeter()


def max_memory(first: Memory | None, second: Memory) -> Memory:
    """The larger peaks of two stretches, field by field; retries add up."""
    if first is None:
        return second
    if _is_within(first, second):  # as most do, and this is asked at every part of a step
        return first
    resident = max(first, second, key=lambda memory: memory.rss_bytes or -1)
    retries = [memory.num_alloc_retries for memory in (first, second) if memory.num_alloc_retries is not None]
    return resident.model_copy(
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
        value, most = getattr(second, name), getattr(first, name)
        if value is not None and (most is None or value > most):
            return False
    return True


def max_over_ranks(memory_by_rank: Sequence[dict[str, Memory]]) -> dict[str, Memory]:
    """The largest of each figure over ranks, phase by phase."""
    found: dict[str, Memory] = {}
    for phase, memory in (item for rank in memory_by_rank for item in rank.items()):
        most = max_memory(found.get(phase), memory)
        retries = [m.num_alloc_retries for m in (found.get(phase, memory), memory) if m.num_alloc_retries is not None]
        found[phase] = most.model_copy(update={"num_alloc_retries": max(retries, default=None)})
    return found


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is shared out, any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return,operator]


def iter_tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """Tensors among ``values``, and those that objects among them hold (a projection, say)."""
    for value in values:
        if hasattr(value, "to_local"):
            yield local_shard(value)  # type: ignore[arg-type]
        elif hasattr(value, "__tensor_flatten__"):  # a tensor made of others, as torchao's 8-bit states
            yield from iter_tensors(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from iter_tensors(value)
        elif hasattr(value, "__dict__"):
            yield from iter_tensors(vars(value).values())


def count_storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def read_proc_status_bytes(key: str) -> int | None:
    """A figure of /proc/self/status in bytes; the file speaks of kibibytes and calls them kB."""
    try:
        lines = _PROC_STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _release_freed_pages() -> None:
    """Let glibc return what is free, so that a peak starts from what is in use."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
