"""Instruments that slow a step down, and so look at warm-up steps alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from peftbench.profiler.memory_breakdown import MemoryTracker, EngineBuffers
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.memory_snapshot import record_memory_history

FLOP_COUNT_STEP = 1
"""Whose FLOPs are counted."""
MEMORY_HISTORY_STEPS = 2
"""First steps whose allocations are noted: in the second the optimizer's states are there, and most that fits once fits
then."""


@dataclass
class StepInstruments:
    """What looks at the warm-up steps of one run."""

    history: bool
    """Whether the allocator notes where allocations come from, for the snapshot of an out-of-memory."""
    flops: FlopCounter | None = None
    breakdown: MemoryTracker | None = None
    breakdown_step: int | None = None

    def step(self, number: int) -> AbstractContextManager[None] | None:
        """What looks at step ``number``, counted from 1; None where nothing does."""
        looking: list[AbstractContextManager[object]] = []
        if self.history and number <= MEMORY_HISTORY_STEPS:
            looking.append(record_memory_history())
        if self.flops is not None and number == FLOP_COUNT_STEP:
            looking.append(self.flops)
        if self.breakdown is not None and number == self.breakdown_step:
            looking.append(self.breakdown)
        return _enter_all(looking) if looking else None


@contextmanager
def _enter_all(contexts: list[AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def build_instruments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    vocabulary: int,
    part: Callable[[], str | None],
    count_flops: bool,
    breakdown_step: int | None,
    checkpointing: bool = False,
    holdings: Callable[[], EngineBuffers] = EngineBuffers,
) -> StepInstruments:
    """The instruments of a run on ``device``; ``part`` tells which part of the step is being done."""
    book = None
    if breakdown_step is not None:
        there = None if device.type == "cpu" else device.type
        book = MemoryTracker(model, optimizer, vocabulary, part, holdings=holdings, device=there)
    # Where checkpointing stops computing again, by an exception, torch 2.11 cannot look at Python's stack: the backward
    # pass would end with a SystemError.
    history = device.type == "cuda" and torch.cuda.get_allocator_backend() == "native" and not checkpointing
    # Some optimizers multiply matrices too, and FLOPs are those of forward and backward pass.
    counter = FlopCounter(lambda: part() == "optimizer") if count_flops else None
    return StepInstruments(history, counter, book, breakdown_step)
