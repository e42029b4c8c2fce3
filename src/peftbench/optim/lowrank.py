"""Optimizers that keep the moments of a matrix's gradient in a space of low rank, from pytorch-optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.errors import OptimizerError
from peftbench.optim.base import Betas

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


class _LowRank(Betas):
    needs_matrices: ClassVar[bool] = True
    of_library: ClassVar[str]

    rank: int = Field(default=128, gt=0)
    """Rank that a matrix's gradient is projected to."""
    update_gap: int = Field(default=200, gt=0)
    """Steps after which the projection is made anew."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on a projected step."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise OptimizerError(
                f"optimizer.kind={self.kind} needs pytorch-optimizer; install peftbench[optimizers]"
            ) from error
        trained = list(parameters)
        apart = {id(parameter) for parameter in embeddings}
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in apart and min(p.shape) > self.rank]
        chosen = {id(parameter) for parameter in matrices}
        projected = {
            "params": matrices, "rank": self.rank, "update_proj_gap": self.update_gap, "scale": self.scale,
            "projection_type": "std",
        }  # fmt: skip
        rest = {"params": [parameter for parameter in trained if id(parameter) not in chosen]}
        made: torch.optim.Optimizer = getattr(pytorch_optimizer, self.of_library)(
            [group for group in (projected, rest) if group["params"]], lr=self.learning_rate, betas=self.betas,
            eps=self.eps, weight_decay=self.weight_decay,
        )  # fmt: skip
        return made

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        total = 0
        for group in groups:
            for shape in (tuple(parameter.shape) for parameter in group["params"]):
                if "rank" in group:  # two moments of the projected gradient, and the projection
                    total += 4 * group["rank"] * (2 * max(shape) + min(shape))
                else:
                    total += 8 * math.prod(shape)
        return total


class GaLore(_LowRank):
    """AdamW over gradients projected to a low rank (Zhao et al. 2024, arXiv:2403.03507); small matrices whole."""

    changes_trajectory: ClassVar[str | None] = "steps of matrices are of low rank"
    of_library: ClassVar[str] = "GaLore"

    kind: Literal["galore"] = "galore"
    """Which optimizer."""


class Apollo(_LowRank):
    """Gradients scaled as AdamW would in a random low-rank space (Zhu et al. 2024, arXiv:2412.05270)."""

    changes_trajectory: ClassVar[str | None] = "steps of matrices have the gradient's direction, and scales of low rank"
    of_library: ClassVar[str] = "APOLLO"

    kind: Literal["apollo"] = "apollo"
    """Which optimizer."""

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        norms = sum(4 for group in groups if "rank" in group for _ in group["params"])  # of the step before
        return super().state_bytes(groups) + norms
