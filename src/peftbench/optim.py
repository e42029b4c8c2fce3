"""Optimizers and schedules. An optimizer sees only the parameters that require a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Discriminator, Field, Tag

from peftbench.part import Part

if TYPE_CHECKING:
    import torch
    from torch import nn


class Optimizer(Part):
    """What all optimizers have in common."""

    kind: str
    """Which optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on every trained tensor."""

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A torch optimizer over ``parameters``."""


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019), torch's own, fused on CUDA."""

    kind: Literal["adamw"] = "adamw"
    """Which optimizer."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        trained = list(parameters)
        return torch.optim.AdamW(
            trained,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=all(parameter.is_cuda for parameter in trained) or None,
        )


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, torch's own. Its weight decay is not decoupled."""

    kind: Literal["sgd"] = "sgd"
    """Which optimizer."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum; 0 keeps no state."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD}

if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    # Knobs given without a kind are those of the default optimizer.
    AnyOptimizer = Annotated[
        Union[tuple(Annotated[optimizer, Tag(kind)] for kind, optimizer in OPTIMIZERS.items())],
        Discriminator(
            lambda knobs: knobs.get("kind", "adamw") if isinstance(knobs, dict) else getattr(knobs, "kind", None)
        ),
    ]
