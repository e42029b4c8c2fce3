"""Instruments that slow a step down, and so look at warm-up steps alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from peftbench.profiler.breakdown import Breakdown
from peftbench.profiler.counter import FlopCounter
from peftbench.profiler.snapshot import with_history

COUNTED_STEP = 1
"""Whose FLOPs are counted."""


@dataclass
class Inspection:
    """What looks at the warm-up steps of one run."""

    history: bool
    """Whether the GPU's allocator notes where allocations come from, for the snapshot of an out-of-memory."""
    flops: FlopCounter | None = None
    breakdown: Breakdown | None = None
    breakdown_step: int | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Look at step ``number``, counted from 1."""
        with ExitStack() as stack:
            if self.history:
                stack.enter_context(with_history())
            if self.flops is not None and number == COUNTED_STEP:
                stack.enter_context(self.flops)
            if self.breakdown is not None and number == self.breakdown_step:
                stack.enter_context(self.breakdown)
            yield


def inspection(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    vocabulary: int,
    part: Callable[[], str | None],
    count_flops: bool,
    breakdown_step: int | None,
) -> Inspection:
    """The instruments of a run on ``device``; ``part`` tells which part of the step is being done."""
    book = Breakdown(model, optimizer, vocabulary, part) if breakdown_step is not None else None
    return Inspection(device.type == "cuda", FlopCounter() if count_flops else None, book, breakdown_step)
