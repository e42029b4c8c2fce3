"""Write a snapshot of the CUDA allocator on an out-of-memory error, to see what used the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_MAX_HISTORY_ENTRIES = 100_000


def dump_on_oom(path: Path, on_oom: Callable[[], None]) -> None:
    """On each out-of-memory error of this process's CUDA allocator, call ``on_oom`` and write a snapshot to ``path``.

    The snapshot is written before anything is freed.

    Raises:
        RuntimeError: the allocator backend is not torch's native one and has no snapshot.
    """
    if torch.cuda.get_allocator_backend() != "native":
        raise RuntimeError(f"The allocator backend {torch.cuda.get_allocator_backend()} has no snapshot")

    def write_snapshot(_device: int, _requested: int, _device_total: int, _device_free: int) -> None:
        on_oom()
        dump_snapshot(path)

    torch._C._cuda_attach_out_of_memory_observer(write_snapshot)  # type: ignore[attr-defined]


def dump_snapshot(path: Path) -> None:
    """Write the state of this process's CUDA allocator to ``path``; ignore errors."""
    with suppress(Exception):  # a full disk must not hide the out-of-memory error
        torch.cuda.memory._dump_snapshot(str(path))


@contextmanager
def record_memory_history() -> Iterator[None]:
    """Record the Python stack of each allocation for a snapshot. This slows Python down."""
    with suppress(RuntimeError, TypeError, AttributeError):  # private torch API
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MAX_HISTORY_ENTRIES)
    try:
        yield
    finally:
        with suppress(RuntimeError, TypeError, AttributeError):
            torch.cuda.memory._record_memory_history(enabled=None)
