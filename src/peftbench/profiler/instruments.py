"""Instruments that slow down a step and therefore run only in warm-up steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.memory_breakdown import EngineBuffers, MemoryTracker
from peftbench.profiler.memory_snapshot import record_memory_history

FLOP_COUNT_STEP = 1
"""Number of the step whose FLOPs are counted."""
MEMORY_HISTORY_STEPS = 2
"""Number of first steps whose allocation history is recorded. Optimizer states exist from the second step, and most
runs that pass it do not run out of memory later."""


@dataclass
class StepInstruments:
    """Instruments for the warm-up steps of one run."""

    records_memory_history: bool
    """True if the allocator records stack traces for the snapshot of an out-of-memory error."""
    flop_counter: FlopCounter | None = None
    memory_tracker: MemoryTracker | None = None
    memory_breakdown_step: int | None = None

    def get_step_context(self, number: int) -> AbstractContextManager[None] | None:
        """Return the instruments of step ``number``, counted from 1, as one context; None if there are none."""
        contexts: list[AbstractContextManager[object]] = []
        if self.records_memory_history and number <= MEMORY_HISTORY_STEPS:
            contexts.append(record_memory_history())
        if self.flop_counter is not None and number == FLOP_COUNT_STEP:
            contexts.append(self.flop_counter)
        if self.memory_tracker is not None and number == self.memory_breakdown_step:
            contexts.append(self.memory_tracker)
        return _enter_all(contexts) if contexts else None


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
    list_method_tensors: Callable[[], Iterable[torch.Tensor]] = tuple,
) -> StepInstruments:
    """Build the instruments of a run on ``device``; ``get_step_part`` returns the current part of the step."""
    memory_tracker = None
    if memory_breakdown_step is not None:
        tracked_device = None if device.type == "cpu" else device.type
        memory_tracker = MemoryTracker(
            model,
            optimizer,
            vocab_size,
            get_step_part,
            get_engine_buffers=get_engine_buffers,
            device_type=tracked_device,
            list_method_tensors=list_method_tensors,
        )
    # Checkpointing ends a recomputation early with an exception. Reading the Python stack then fails in torch 2.11 with
    # a SystemError in the backward pass.
    history = device.type == "cuda" and torch.cuda.get_allocator_backend() == "native" and not gradient_checkpointing
    # Some optimizers multiply matrices too; only forward and backward passes are counted.
    counter = FlopCounter(lambda: get_step_part() == "optimizer") if count_flops else None
    return StepInstruments(history, counter, memory_tracker, memory_breakdown_step)
