"""The one loop: every method and every engine passes through it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from peftbench.data.batches import GlobalBatch
from peftbench.data.collate import FlopUnits, TokenCounts
from peftbench.distributed.collectives import get_dp_world_size
from peftbench.training.prefetch import prefetch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftbench.profiler.probe import Probe
    from peftbench.training.build import TrainingComponents


class DivergedError(Exception):
    """A loss is not a finite number, at or after ``step`` (counted from 1)."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class TrainProgress:
    """What training has done so far; kept up to date, so that it outlives whatever ends the loop."""

    losses: list[float] = field(default_factory=list)
    step_token_counts: list[TokenCounts] = field(default_factory=list)
    """Tokens of each step, over all ranks."""
    step_required: list[FlopUnits] = field(default_factory=list)
    step_executed: list[FlopUnits] = field(default_factory=list)
    """What each step needed and what it computed, over all ranks."""
    step_shapes: list[tuple[int, int]] = field(default_factory=list)
    """Most rows and most real positions of this rank's micro-batches, by step."""
    skipped_steps: int = 0
    """Steps that fp16's loss scaler took back, because a gradient overflowed."""

    @property
    def token_counts(self) -> TokenCounts:
        """Tokens of all steps."""
        return sum(self.step_token_counts, TokenCounts())

    @property
    def completed_steps(self) -> int:
        """Finished optimizer steps."""
        return len(self.losses)


def no_timer(_part: str) -> AbstractContextManager[None]:
    """A part of a step that nobody looks at."""
    return nullcontext()


def train_step(
    accelerator: Accelerator,
    training: TrainingComponents,
    batch: GlobalBatch,
    max_grad_norm: float | None,
    part: Callable[[str], AbstractContextManager[None]] = no_timer,
) -> float:
    """One optimizer step; returns the mean loss over the labelled tokens of the whole global batch, in nats."""
    # Engines average gradients over processes, and accelerate over micro-batches; the loss wants their sum over the
    # tokens of all of them.
    replicas = get_dp_world_size(accelerator)
    scale = replicas * accelerator.gradient_accumulation_steps / batch.token_counts.labelled
    total = torch.zeros((), device=accelerator.device)
    for micro_batch in batch.micro_batches:
        with accelerator.accumulate(training.model):
            with part("forward"), training.autocast(), training.activation_offload():
                loss = training.loss(training.model, micro_batch.to(accelerator.device))
            with part(training.backward_part):
                accelerator.backward(loss * scale)
        total += loss.detach()
    with part("optimizer"):
        if max_grad_norm is not None:
            accelerator.clip_grad_norm_(training.model.parameters(), max_grad_norm)
        training.optimizer.step()
        training.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:  # fp16's loss scaler found an overflow and takes the step back
        training.lr_scheduler.step()
    return float(accelerator.reduce(total).item()) / batch.token_counts.labelled  # the step's one synchronisation


def train(
    accelerator: Accelerator,
    training: TrainingComponents,
    probe: Probe,
    progress: TrainProgress,
    *,
    max_grad_norm: float | None,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Run all steps that ``progress`` does not hold yet.

    ``on_step`` is told (step, what was measured), outside the step's clock.

    Raises:
        DivergedError: a loss is not finite; ``progress`` holds every step before it.
    """
    left = itertools.islice(
        training.batches.skip_first_batches(progress.completed_steps), training.total_steps - progress.completed_steps
    )
    for batch in prefetch(left, accelerator.device):
        learning_rate = float(training.lr_scheduler.get_last_lr()[0])
        with probe.step():
            loss = train_step(accelerator, training, batch, max_grad_norm, probe.part)
        if not math.isfinite(loss):
            raise DivergedError(
                progress.completed_steps + 1, f"the loss of step {progress.completed_steps + 1} is {loss}"
            )
        progress.losses.append(loss)
        progress.skipped_steps += bool(accelerator.optimizer_step_was_skipped)
        progress.step_token_counts.append(batch.token_counts)
        progress.step_required.append(batch.model_flop_units)
        progress.step_executed.append(batch.hardware_flop_units)
        progress.step_shapes.append(batch.max_shape)
        with probe.paused():
            on_step(progress.completed_steps, {"loss": loss, "learning_rate": learning_rate})
