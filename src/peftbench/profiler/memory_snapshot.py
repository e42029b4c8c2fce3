"""The state of the GPU's allocator at the moment it refuses: what a person opens to see who held the memory.

https://pytorch.org/memory_viz shows the file in a browser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_MAX_HISTORY_ENTRIES = 100_000


def dump_on_oom(path: Path, on_oom: Callable[[], None]) -> None:
    """Let every refusal of the CUDA allocator of this process write its state to ``path``, before anything is freed.

    ``told`` is called then, too.

    Raises:
        RuntimeError: the allocator is another than torch's own, which has no state to show.
    """
    if torch.cuda.get_allocator_backend() != "native":
        raise RuntimeError(f"the allocator {torch.cuda.get_allocator_backend()} has no snapshot")

    def refused(_device: int, _asked: int, _of_device: int, _free: int) -> None:
        on_oom()
        dump_snapshot(path)

    torch._C._cuda_attach_out_of_memory_observer(refused)  # type: ignore[attr-defined]


def dump_snapshot(path: Path) -> None:
    """Write the state of the CUDA allocator of this process to ``path``, if that can be done."""
    with suppress(Exception):  # a full disk must not hide the out-of-memory
        torch.cuda.memory._dump_snapshot(str(path))


@contextmanager
def record_memory_history() -> Iterator[None]:
    """Note where each allocation comes from, which a snapshot then shows. It slows Python down."""
    with suppress(RuntimeError, TypeError, AttributeError):  # torch's own, and free to change
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MAX_HISTORY_ENTRIES)
    try:
        yield
    finally:
        with suppress(RuntimeError, TypeError, AttributeError):
            torch.cuda.memory._record_memory_history(enabled=None)
