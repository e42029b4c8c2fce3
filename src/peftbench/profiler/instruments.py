"""Instruments that slow a step down, and so look at warm-up steps alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.memory_breakdown import EngineBuffers, MemoryTracker
from peftbench.profiler.memory_snapshot import record_memory_history

FLOP_COUNT_STEP = 1
"""Whose FLOPs are counted."""
MEMORY_HISTORY_STEPS = 2
"""First steps whose allocations are noted: in the second the optimizer's states are there, and most that fits once fits
then."""


@dataclass
class StepInstruments:
    """What looks at the warm-up steps of one run."""

    records_memory_history: bool
    """Whether the allocator notes where allocations come from, for the snapshot of an out-of-memory."""
    flop_counter: FlopCounter | None = None
    memory_tracker: MemoryTracker | None = None
    memory_breakdown_step: int | None = None

    def get_step_context(self, number: int) -> AbstractContextManager[None] | None:
        """What looks at step ``number``, counted from 1; None where nothing does."""
        looking: list[AbstractContextManager[object]] = []
        if self.records_memory_history and number <= MEMORY_HISTORY_STEPS:
            looking.append(record_memory_history())
        if self.flop_counter is not None and number == FLOP_COUNT_STEP:
            looking.append(self.flop_counter)
        if self.memory_tracker is not None and number == self.memory_breakdown_step:
            looking.append(self.memory_tracker)
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
    vocab_size: int,
    get_step_part: Callable[[], str | None],
    count_flops: bool,
    memory_breakdown_step: int | None,
    gradient_checkpointing: bool = False,
    get_engine_buffers: Callable[[], EngineBuffers] = EngineBuffers,
) -> StepInstruments:
    """The instruments of a run on ``device``; ``part`` tells which part of the step is being done."""
    book = None
    if memory_breakdown_step is not None:
        there = None if device.type == "cpu" else device.type
        book = MemoryTracker(
            model, optimizer, vocab_size, get_step_part, get_engine_buffers=get_engine_buffers, device_type=there
        )
    # Where checkpointing stops computing again, by an exception, torch 2.11 cannot look at Python's stack: the backward
    # pass would end with a SystemError.
    history = device.type == "cuda" and torch.cuda.get_allocator_backend() == "native" and not gradient_checkpointing
    # Some optimizers multiply matrices too, and FLOPs are those of forward and backward pass.
    counter = FlopCounter(lambda: get_step_part() == "optimizer") if count_flops else None
    return StepInstruments(history, counter, book, memory_breakdown_step)
