"""Limit a process to less memory than its device has, to test a run for a smaller device.

On CUDA, the limit is torch's per-process memory fraction: the budget minus the context and workspaces of the process.
On CPU, the limit is ``RLIMIT_DATA`` (setrlimit(2)): the data size before the model is loaded plus the budget. Libraries
are imported before that. glibc is set to return freed blocks to the system, or its cache would count against the
budget, and its free blocks are taken, or tensors in them would not count. Arrow's memory pool is part of the data size
before: rows in Arrow tables count only beyond the pool's size, and tensors never use it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftbench.common.units import format_bytes
from peftbench.errors import BudgetError
from peftbench.memory.allocator import CpuPages
from peftbench.memory.devices import get_device_facts, get_facts_by_torch_name
from peftbench.profiler.memory import read_proc_status_bytes, read_reserved_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


_CPU_OVERHEAD_BYTES = int(get_device_facts("cpu").workspaces[0])


@dataclass(frozen=True)
class MemoryLimit:
    """An active memory limit of this process."""

    budget_bytes: int
    tensor_bytes: int
    """The part of the budget for tensors; on CPU it includes all other allocations of the process."""
    read_in_use_bytes: Callable[[], int]
    """Returns the bytes in use now."""
    release: Callable[[], None]
    """Removes the limit."""


def limit_memory(budget_bytes: int, device: torch.device, cuda_context_bytes: int | None) -> MemoryLimit:
    """Limit this process to ``budget_bytes`` of ``device``.

    ``cuda_context_bytes`` is the measured size of the CUDA context, None if unknown.

    Raises:
        BudgetError: the device has less memory, or the budget leaves no room for tensors.
    """
    if device.type == "cuda":
        return _limit_cuda_memory(budget_bytes, device, cuda_context_bytes)
    return _limit_cpu_memory(budget_bytes)


def _limit_cuda_memory(budget_bytes: int, device: torch.device, cuda_context_bytes: int | None) -> MemoryLimit:
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    properties = torch.cuda.get_device_properties(device)
    _check_capacity(budget_bytes, properties.total_memory, properties.name)
    facts = get_facts_by_torch_name(properties.name)
    # The context was measured before the first kernel; kernels are loaded lazily.
    overhead = max(facts.context[1], cuda_context_bytes or 0) + facts.workspaces[1]
    tensor_bytes = budget_bytes - overhead
    if tensor_bytes <= 0:
        raise BudgetError(
            f"budget.memory={format_bytes(budget_bytes)} leaves no room for tensors: the CUDA context and workspaces "
            f"on {properties.name} need {format_bytes(overhead)}; increase it"
        )
    torch.cuda.set_per_process_memory_fraction(tensor_bytes / properties.total_memory, device)
    return MemoryLimit(
        budget_bytes,
        tensor_bytes,
        lambda: read_reserved_bytes(device),
        lambda: torch.cuda.set_per_process_memory_fraction(1.0, device),
    )


def _limit_cpu_memory(budget_bytes: int) -> MemoryLimit:
    total = _read_total_memory()
    if total is None or read_proc_status_bytes("VmData") is None:
        raise BudgetError("On CPU, budget.memory works only on Linux; remove it")
    _check_capacity(budget_bytes, total, "this machine")
    if budget_bytes < _CPU_OVERHEAD_BYTES:
        raise BudgetError(
            f"budget.memory={format_bytes(budget_bytes)} is less than the {format_bytes(_CPU_OVERHEAD_BYTES)} that a "
            "CPU process needs in addition to its tensors; increase it"
        )
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # stacks of loader threads count as data
    _import_libraries()
    gc.collect()  # garbage from earlier would raise the limit
    heap_blocks = _disable_malloc_caching()
    before = read_proc_status_bytes("VmData") or 0
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = before + budget_bytes
    if hard != resource.RLIM_INFINITY and limit > hard:
        raise BudgetError(
            f"budget.memory={format_bytes(budget_bytes)} plus the {format_bytes(before)} in use exceeds this process's "
            f"hard limit of {format_bytes(hard)} (ulimit -d); decrease it"
        )
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return MemoryLimit(
        budget_bytes,
        budget_bytes,
        lambda: (read_proc_status_bytes("VmData") or before) - before,
        lambda: _release_cpu_memory((soft, hard), heap_blocks),
    )


def _check_capacity(budget_bytes: int, capacity_bytes: int, name: str) -> None:
    if budget_bytes > capacity_bytes:
        raise BudgetError(
            f"budget.memory={format_bytes(budget_bytes)} exceeds the {format_bytes(capacity_bytes)} of {name}; "
            "decrease or remove it"
        )


def _read_total_memory() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        total_line = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[0]
        return int(total_line.split()[1]) * 1024
    return None


def _import_libraries() -> None:
    """Import what a run imports lazily and start its threads, so that they do not count against the budget."""
    import datasets  # noqa: F401
    import nltk  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers
    from torch import _dynamo  # noqa: F401  # imported by the first step of an optimizer
    from tqdm.auto import tqdm

    # transformers imports its classes on first access.
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "get_scheduler", "GPT2LMHeadModel"):
        getattr(transformers, name)
    with tqdm(disable=None):  # the first bar starts a thread
        pass
    layer = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(256, 256)).sum().backward()
    optimizer.step()


def _disable_malloc_caching() -> list[int]:
    """Make glibc map and unmap each large block; by default it caches blocks of up to 32 MiB.

    Returns the addresses of the blocks that were free in its heap and are large enough for a mapped block; they are
    taken, and their pages are not resident.
    """
    blocks: list[int] = []
    with suppress(OSError, AttributeError):  # not glibc
        library = _load_libc()
        library.mallopt(_M_MMAP_THRESHOLD, CpuPages.MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, CpuPages.MMAP_THRESHOLD)
        library.malloc_trim(0)
        block = library.malloc(CpuPages.MMAP_THRESHOLD)
        while block is not None and not _is_mapped(block):
            blocks.append(block)
            block = library.malloc(CpuPages.MMAP_THRESHOLD)
        library.free(block)
    return blocks


def _is_mapped(block: int) -> bool:
    """Return whether a block of glibc has its own pages: bit 1 of the size before it."""
    return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)


def _release_cpu_memory(limits: tuple[int, int], heap_blocks: list[int]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    while heap_blocks:
        _load_libc().free(heap_blocks.pop())


def _load_libc() -> ctypes.CDLL:
    library = ctypes.CDLL("libc.so.6")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    return library
