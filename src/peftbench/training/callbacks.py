"""Code that runs after every optimizer step or evaluation, outside of the step's timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from peftbench.record import HeldOutCurve


@dataclass(frozen=True)
class StepInfo:
    """Results of one optimizer step."""

    step: int
    """Number of the step, counted from 1."""
    total_steps: int
    loss: float
    """Mean over the labeled tokens of the global batch, in nats."""
    learning_rate: float
    """Learning rate that the step used."""
    real_tokens: int
    """Tokens of the global batch without padding, over all ranks."""


class StepCallback(Protocol):
    """Called after every optimizer step, on every rank and in the order of the list that ``train`` receives."""

    def after_step(self, info: StepInfo) -> None:
        """Handle a finished step. Time spent here is in no measurement."""


class EvaluationCallback(Protocol):
    """Called after every evaluation during training, on every rank, before the checkpoint of its step."""

    def after_evaluation(self, curve: HeldOutCurve) -> None:
        """Handle the last point of ``curve``. Time spent here is in no measurement."""
