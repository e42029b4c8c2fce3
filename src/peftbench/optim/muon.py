"""Muon: orthogonalized momentum for hidden matrices, and AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.optim.base import AdamLike
from peftbench.optim.roles import NO_ROLES, ParameterRoles
from peftbench.optim.torch_optimizers import FUSED_DEVICES

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters

MATRIX_KEY = "ns_steps"
"""Key that only the parameter groups of Muon have."""


class Muon(AdamLike):
    """Muon (Jordan et al. 2024) of torch for hidden matrices; AdamW for embeddings, output head, norms and biases.

    With ``adjust_lr_fn=match_rms_adamw`` an update has the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that
    learning rate and weight decay are in AdamW's range. ``betas`` and ``eps`` are AdamW's. With ``original`` the scale
    depends on the rows of the matrix, which are outputs in a Linear layer and inputs in GPT-2's Conv1D.
    """

    is_fused: ClassVar[bool] = True
    needs_matrices: ClassVar[bool] = True
    dtensor_limitation: ClassVar[str | None] = "Muon's matrix products over DTensors are untested"
    approximation: ClassVar[str | None] = "updates of hidden matrices are orthogonalized, in bf16"
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw",)

    kind: Literal["muon"] = "muon"
    """Kind of optimizer."""
    adamw_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the parameters that AdamW steps; null: learning_rate."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the momentum of hidden matrices."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    ns_steps: int = Field(default=5, gt=0, lt=100)
    """Newton-Schulz iterations of an orthogonalization."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Scale of the update of a rows x columns matrix: 0.2 sqrt(max(rows, columns)), or sqrt(max(1, rows / columns))."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        from peftbench.optim.muon_with_adamw import MuonWithAdamW

        trained = list(parameters)
        others = {id(parameter) for parameter in (*roles.embeddings, *roles.head)}
        matrices = [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) not in others]
        matrix_ids = {id(parameter) for parameter in matrices}
        muon = {
            "params": matrices,
            "lr": self.learning_rate,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            MATRIX_KEY: self.ns_steps,
            "adjust_lr_fn": self.adjust_lr_fn,
        }
        adamw = {
            "params": [parameter for parameter in trained if id(parameter) not in matrix_ids],
            "lr": self.adamw_learning_rate or self.learning_rate,
            "betas": self.betas,
            "eps": self.eps,
            "fused": all(parameter.device.type in FUSED_DEVICES for parameter in trained) or None,
        }
        groups = [{**group, "weight_decay": self.weight_decay} for group in (muon, adamw) if group["params"]]
        return MuonWithAdamW(groups)

    def list_notes(self, param_groups: Sequence[dict[str, Any]]) -> list[str]:
        matrices = sum(p.numel() for group in param_groups if MATRIX_KEY in group for p in group["params"])
        total = sum(p.numel() for group in param_groups for p in group["params"])
        return [f"muon steps the {matrices} parameters in hidden matrices, and AdamW the other {total - matrices}"]

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        total = 0
        for group in param_groups:
            for size in (math.prod(parameter.shape) for parameter in group["params"]):
                total += 4 * size if MATRIX_KEY in group else 8 * size + 4
        return total
