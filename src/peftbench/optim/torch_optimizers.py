"""Optimizers of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.optim.base import AdamLike, Optimizer, tensor_sizes
from peftbench.optim.roles import NO_ROLES, ParameterRoles

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


FUSED_DEVICES = frozenset({"cpu", "cuda"})
"""Devices with a fused kernel of AdamW."""


class AdamW(AdamLike):
    """AdamW (Loshchilov and Hutter 2019) of torch, with its fused kernel."""

    is_fused: ClassVar[bool] = True
    is_common_fallback: ClassVar[bool] = True
    low_memory_variants: ClassVar[tuple[str, ...]] = ("adamw8bit", "adamw8bit_bf16")

    kind: Literal["adamw"] = "adamw"
    """Kind of optimizer."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        import torch

        trained = list(parameters)
        return torch.optim.AdamW(
            trained,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=all(parameter.device.type in FUSED_DEVICES for parameter in trained) or None,
        )

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        return sum(8 * size + 4 for size, _ in tensor_sizes(param_groups))  # two moments and a step counter


class SGD(Optimizer):
    """Stochastic gradient descent of torch, with momentum. Its weight decay is not decoupled."""

    kind: Literal["sgd"] = "sgd"
    """Kind of optimizer."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum; with 0 it has no state."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        return sum(4 * size for size, _ in tensor_sizes(param_groups)) if self.momentum else 0


class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) of torch, with factored second moments of matrices."""

    needs_matrices: ClassVar[bool] = True
    dtensor_limitation: ClassVar[str | None] = "torch's Adafactor uses operations that DTensor does not support"
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw8bit",)

    kind: Literal["adafactor"] = "adafactor"
    """Kind of optimizer."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """Exponent with which the second moment's decay rate approaches 1."""
    clip: float = Field(default=1.0, gt=0)
    """Largest root mean square of an update."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        import torch

        return torch.optim.Adafactor(
            parameters, lr=self.learning_rate, beta2_decay=self.beta2_decay, d=self.clip, weight_decay=self.weight_decay
        )

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        shapes = (tuple(p.shape) for group in param_groups for p in group["params"])
        state_sizes = (math.prod(s) if len(s) < 2 else math.prod(s[:-1]) + math.prod((*s[:-2], s[-1])) for s in shapes)
        return sum(4 * size + 4 for size in state_sizes)
