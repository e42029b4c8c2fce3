"""Holds a process to less memory than its device has, so that what passes here passes where there is no more.

On CUDA torch's allocator is told the largest fraction of the device that it may take: the budget, less what a process
holds there beside its tensors. On CPU the system refuses the process more data (``RLIMIT_DATA``, setrlimit(2)) than it
had before the model was loaded and the budget; libraries are imported before that, and blocks of memory go back to the
system as they are freed, or the C library's own hoard would count as the run's.
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
    """What holds this process to its budget."""

    budget_bytes: int
    tensor_bytes: int
    """What is left of the budget for tensors, and on CPU for whatever else the process allocates."""
    read_in_use_bytes: Callable[[], int]
    """What of it is held now."""
    release: Callable[[], None]
    """Let the process have as much as there is again."""


def limit_memory(budget_bytes: int, device: torch.device, cuda_context_bytes: int | None) -> MemoryLimit:
    """Hold this process to ``budget_bytes`` of ``device`` from now on.

    ``context_bytes`` is what it holds of a GPU beside tensors, None where nothing tells.

    Raises:
        BudgetError: the device has less, or the budget leaves nothing for tensors.
    """
    if device.type == "cuda":
        return _limit_cuda_memory(budget_bytes, device, cuda_context_bytes)
    return _limit_cpu_memory(budget_bytes)


def _limit_cuda_memory(budget_bytes: int, device: torch.device, cuda_context_bytes: int | None) -> MemoryLimit:
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    properties = torch.cuda.get_device_properties(device)
    _check_capacity(budget_bytes, properties.total_memory, properties.name)
    facts = get_facts_by_torch_name(properties.name)
    # What was measured is of before the first kernel, and kernels are loaded as they are needed.
    beside = max(facts.context[1], cuda_context_bytes or 0) + facts.workspaces[1]
    tensors = budget_bytes - beside
    if tensors <= 0:
        raise BudgetError(
            f"budget.memory={budget_bytes:,} bytes is no more than the {beside:,} that a process holds of "
            f"{properties.name} beside its tensors; give more"
        )
    torch.cuda.set_per_process_memory_fraction(tensors / properties.total_memory, device)
    return MemoryLimit(
        budget_bytes,
        tensors,
        lambda: read_reserved_bytes(device),
        lambda: torch.cuda.set_per_process_memory_fraction(1.0, device),
    )


def _limit_cpu_memory(budget_bytes: int) -> MemoryLimit:
    total = _read_total_memory()
    if total is None or read_proc_status_bytes("VmData") is None:
        raise BudgetError("budget.memory holds a run on CPU to a budget on Linux alone; take it out")
    _check_capacity(budget_bytes, total, "this machine")
    if budget_bytes < _CPU_OVERHEAD_BYTES:
        raise BudgetError(
            f"budget.memory={budget_bytes:,} bytes is less than the {_CPU_OVERHEAD_BYTES:,} that a process on CPU takes beside its "
            "tensors; give more"
        )
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the stacks of transformers' threads count as data, however empty
    _import_libraries()
    gc.collect()  # or cycles of before would be counted as held, and be the run's to have
    _disable_malloc_caching()
    before = read_proc_status_bytes("VmData") or 0
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = before + budget_bytes
    if hard != resource.RLIM_INFINITY and limit > hard:
        raise BudgetError(
            f"budget.memory={budget_bytes:,} bytes is more than this process may have, which is {hard:,} with the "
            f"{before:,} that it has (ulimit -d); give less"
        )
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return MemoryLimit(
        budget_bytes,
        budget_bytes,
        lambda: (read_proc_status_bytes("VmData") or before) - before,
        lambda: resource.setrlimit(resource.RLIMIT_DATA, (soft, hard)),
    )


def _check_capacity(budget_bytes: int, capacity_bytes: int, name: str) -> None:
    if budget_bytes > capacity_bytes:
        raise BudgetError(
            f"budget.memory={budget_bytes:,} bytes is more than the {capacity_bytes:,} of {name}; give less, or take it out"
        )


def _read_total_memory() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        first = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[0]
        return int(first.split()[1]) * 1024
    return None


def _import_libraries() -> None:
    """Import what a run imports as it goes, and start its threads: that is not the model's memory."""
    import datasets  # noqa: F401
    import nltk  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers
    from rouge_score import rouge_scorer  # noqa: F401
    from torch import _dynamo  # noqa: F401  # which torch's optimizers import when they first step
    from tqdm.auto import tqdm

    # transformers imports a thing when it is first asked for it.
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "get_scheduler", "GPT2LMHeadModel"):
        getattr(transformers, name)
    with tqdm(disable=None):  # whose first one starts a thread
        pass
    layer = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(256, 256)).sum().backward()
    optimizer.step()


def _disable_malloc_caching() -> None:
    """Let the C library take each large block from the system and give it back; it would keep those up to 32 MiB."""
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, CpuPages.MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, CpuPages.MMAP_THRESHOLD)
        library.malloc_trim(0)
