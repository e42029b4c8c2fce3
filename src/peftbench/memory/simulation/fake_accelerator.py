"""The part of accelerate's Accelerator that a simulated step needs, for one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class FakeAccelerator:
    """The part of accelerate's Accelerator that a step needs, for one process."""

    gradient_accumulation_steps: int
    num_processes: int = 1
    process_index: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("meta"))
    scaler: None = None
    optimizer_step_was_skipped: bool = False

    def accumulate(self, _model: nn.Module) -> AbstractContextManager[None]:
        """Do nothing: a single process has no gradient synchronization to defer."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Divide the loss by the number of micro-batches and backpropagate, like Accelerator.backward."""
        if self.gradient_accumulation_steps > 1:
            loss = loss / self.gradient_accumulation_steps
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_grad_norm_(self, parameters: Iterator[nn.Parameter], max_norm: float) -> None:
        """Clip gradients, like Accelerator.clip_grad_norm_."""
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, _tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU scalar: callers read its value."""
        return torch.zeros(())
