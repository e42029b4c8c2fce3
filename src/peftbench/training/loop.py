"""The training loop, shared by every method and every engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from peftbench.data.batches import GlobalBatch
from peftbench.data.collate import FlopUnits, TokenCounts
from peftbench.distributed.collectives import get_dp_world_size
from peftbench.training.callbacks import StepCallback, StepInfo
from peftbench.training.prefetch import prefetch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftbench.profiler.probe import Probe
    from peftbench.training.build import TrainingComponents


class DivergedError(Exception):
    """The loss of ``step`` (counted from 1) is not a finite number."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class TrainProgress:
    """Results of the completed steps; updated after each step, so it is valid however the loop ends."""

    losses: list[float] = field(default_factory=list)
    step_token_counts: list[TokenCounts] = field(default_factory=list)
    """Tokens of each step, over all ranks."""
    step_required: list[FlopUnits] = field(default_factory=list)
    """Model FLOP units of each step, over all ranks."""
    step_executed: list[FlopUnits] = field(default_factory=list)
    """Hardware FLOP units of each step, over all ranks."""
    step_skipped: list[FlopUnits] = field(default_factory=list)
    """The part of ``step_executed`` that the frozen part skipped in each step."""
    step_shapes: list[tuple[int, int]] = field(default_factory=list)
    """(rows, real positions) of this rank's largest micro-batch in each step."""
    step_max_labeled: list[int] = field(default_factory=list)
    """Labeled tokens of this rank's micro-batch with the most, in each step."""
    stopped_early: bool = False
    """True once early stopping ends the training; no further step is run."""
    skipped_steps: int = 0
    """Steps that fp16's loss scaler skipped because a gradient overflowed."""

    @property
    def token_counts(self) -> TokenCounts:
        """Token counts of all steps."""
        return sum(self.step_token_counts, TokenCounts())

    @property
    def completed_steps(self) -> int:
        """Number of completed optimizer steps."""
        return len(self.losses)

    def count_remaining_steps(self, total_steps: int) -> int:
        """Return the number of steps that are still to be run."""
        return 0 if self.stopped_early else total_steps - self.completed_steps


def no_timer(_part: str) -> AbstractContextManager[None]:
    """Time nothing: the default for ``train_step``'s ``part``."""
    return nullcontext()


def train_step(
    accelerator: Accelerator,
    training: TrainingComponents,
    batch: GlobalBatch,
    max_grad_norm: float | None,
    part: Callable[[str], AbstractContextManager[None]] = no_timer,
    *,
    step: int = 1,
) -> float:
    """Run one optimizer step; return the mean loss (nats) over the labeled tokens of the global batch.

    ``step`` is its number, counted from 1.
    """
    # Engines average gradients over processes and accelerate averages over micro-batches; the scale turns that into
    # the mean over all labeled tokens.
    scale = get_dp_world_size(accelerator) * accelerator.gradient_accumulation_steps / batch.token_counts.labeled
    total = torch.zeros((), device=accelerator.device)
    for micro_batch in batch.micro_batches:
        with accelerator.accumulate(training.model):
            with part("forward"):
                with training.autocast(), training.activation_offload():
                    loss = training.loss(training.model, micro_batch.to(accelerator.device))
                penalty = training.method_hooks.compute_penalty()
            with part(training.backward_part):  # averaged over micro-batches and processes, so it counts once
                accelerator.backward(loss * scale if penalty is None else loss * scale + penalty)
        total += loss.detach()
    with part("optimizer"):
        if max_grad_norm is not None:
            accelerator.clip_grad_norm_(training.model.parameters(), max_grad_norm)
        training.optimizer.step()
        was_skipped = accelerator.optimizer_step_was_skipped  # fp16's loss scaler found an overflow
        training.method_hooks.after_optimizer_step(step, was_skipped=was_skipped)
        training.optimizer.zero_grad()
    if not was_skipped:
        training.lr_scheduler.step()
    return float(accelerator.reduce(total).item()) / batch.token_counts.labeled  # the step's only synchronization


def train(
    accelerator: Accelerator,
    training: TrainingComponents,
    probe: Probe,
    progress: TrainProgress,
    *,
    max_grad_norm: float | None,
    callbacks: Sequence[StepCallback] = (),
) -> None:
    """Run the steps that are not in ``progress`` yet, until the last one or until a callback stops the training early.

    ``callbacks`` are called in order after each step, outside of the step's timing.

    Raises:
        DivergedError: a loss is not finite; ``progress`` has all steps before it.
    """
    remaining = itertools.islice(
        training.batches.skip_first_batches(progress.completed_steps),
        progress.count_remaining_steps(training.total_steps),
    )
    for batch in prefetch(remaining, accelerator.device):
        training.start_step(progress.completed_steps)
        learning_rate = float(training.lr_scheduler.get_last_lr()[0])
        with probe.step():
            loss = train_step(
                accelerator, training, batch, max_grad_norm, probe.part, step=progress.completed_steps + 1
            )
        if not math.isfinite(loss):
            raise DivergedError(
                progress.completed_steps + 1, f"the loss of step {progress.completed_steps + 1} is {loss}"
            )
        progress.losses.append(loss)
        progress.skipped_steps += bool(accelerator.optimizer_step_was_skipped)
        progress.step_token_counts.append(batch.token_counts)
        progress.step_required.append(batch.model_flop_units)
        progress.step_executed.append(batch.hardware_flop_units)
        progress.step_skipped.append(batch.skipped_flop_units)
        progress.step_shapes.append(batch.max_shape)
        progress.step_max_labeled.append(batch.max_labeled)
        with probe.paused():
            info = StepInfo(
                progress.completed_steps, training.total_steps, loss, learning_rate, batch.token_counts.real
            )
            for callback in callbacks:
                callback.after_step(info)
        if progress.stopped_early:
            break
