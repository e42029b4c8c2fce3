"""Build the next batch, and pin its memory, while the current one is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from peftbench.data.batches import GlobalBatch


def prefetch(batches: Iterator[GlobalBatch], device: torch.device) -> Iterator[GlobalBatch]:
    """Yield the same batches; on a GPU, a thread builds each one while the previous one is used.

    On CPU, batches are built on demand: a thread would only compete with training for cores.
    """
    if device.type == "cpu":
        yield from batches
        return

    def build_next() -> GlobalBatch | None:
        batch = next(batches, None)
        return None if batch is None else batch.pin_memory()

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as executor:
        future = executor.submit(build_next)
        while (batch := future.result()) is not None:
            future = executor.submit(build_next)
            yield batch
