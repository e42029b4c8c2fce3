"""The next batch is made, and put where a GPU can fetch it, while this one is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from peftbench.data.batches import GlobalBatch


def prefetch(batches: Iterator[GlobalBatch], device: torch.device) -> Iterator[GlobalBatch]:
    """The same batches, each made while the one before it is used, where ``device`` is not what makes them.

    On CPU there is nothing to be gained: whoever makes a batch takes its cores from whoever trains.
    """
    if device.type == "cpu":
        yield from batches
        return

    def made() -> GlobalBatch | None:
        batch = next(batches, None)
        return None if batch is None else batch.pin_memory()

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as maker:
        coming = maker.submit(made)
        while (batch := coming.result()) is not None:
            coming = maker.submit(made)
            yield batch
