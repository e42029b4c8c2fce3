"""Optimizers that keep the moments of a matrix's gradient in a low-rank space."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.errors import OptimizerError
from peftbench.optim.base import AdamLike
from peftbench.optim.roles import NO_ROLES, ParameterRoles

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from peftbench.optim.base import Parameters


class _LowRank(AdamLike):
    needs_matrices: ClassVar[bool] = True
    dtensor_limitation: ClassVar[str | None] = (
        "FSDP shards matrices by rows, and projecting a shard is not the projection of the full matrix"
    )
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw8bit",)
    library_module: ClassVar[str]
    """Module to import from the library."""
    pip_extra: ClassVar[str]
    """Extra of peftbench that installs the library."""

    rank: int = Field(default=128, gt=0)
    """Rank of a matrix's projected gradient."""
    update_gap: int = Field(default=200, gt=0)
    """Steps between updates of the projection."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        try:
            library = import_module(self.library_module)
        except ImportError as error:
            raise OptimizerError(
                f"optimizer.kind={self.kind} needs {self.library}; install peftbench[{self.pip_extra}]"
            ) from error
        trained = list(parameters)
        embedding_ids = {id(parameter) for parameter in roles.embeddings}
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in embedding_ids and min(p.shape) > self.rank]
        matrix_ids = {id(parameter) for parameter in matrices}
        projected = {
            "params": matrices,
            "rank": self.rank,
            "update_proj_gap": self.update_gap,
            **self._projection_kwargs(),
        }
        rest = {"params": [parameter for parameter in trained if id(parameter) not in matrix_ids]}
        optimizer: torch.optim.Optimizer = self._get_library_class(library)(
            [group for group in (projected, rest) if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        return optimizer

    @abstractmethod
    def _get_library_class(self, library: ModuleType) -> Any:
        """Return the library's optimizer class."""

    @abstractmethod
    def _projection_kwargs(self) -> dict[str, Any]:
        """Return the library's options of a projected parameter group."""

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        total = 0
        for group in param_groups:
            for shape in (tuple(parameter.shape) for parameter in group["params"]):
                if "rank" in group:  # two moments of the projected gradient, and the projection
                    total += 4 * group["rank"] * (2 * max(shape) + min(shape))
                else:
                    total += 8 * math.prod(shape)
        return total


class GaLore(_LowRank):
    """AdamW over gradients projected to a low rank (Zhao et al. 2024, arXiv:2403.03507), except of small matrices.

    From pytorch-optimizer, which applies the bias correction of a step to weight decay too.
    """

    library: ClassVar[str] = "pytorch-optimizer"
    approximation: ClassVar[str | None] = "updates of matrices have low rank"
    state_classes: ClassVar[Mapping[str, str]] = {"GaLoreProjector": "pytorch_optimizer.optimizer.utils.galore"}
    library_module: ClassVar[str] = "pytorch_optimizer"
    pip_extra: ClassVar[str] = "optimizers"

    kind: Literal["galore"] = "galore"
    """Kind of optimizer."""
    scale: float = Field(default=0.25, gt=0)
    """Factor of a projected update."""

    def _get_library_class(self, library: ModuleType) -> Any:
        return library.GaLore

    def _projection_kwargs(self) -> dict[str, Any]:
        return {"scale": self.scale, "projection_type": "std"}


class Apollo(_LowRank):
    """APOLLO: gradients with the scales that AdamW has in a random low-rank space (Zhu et al. 2024, arXiv:2412.05270).

    From the authors' package, whose license permits only non-commercial use (CC BY-NC). Rank 1 with one scale for each
    tensor and ``scale=128`` is their APOLLO-Mini.
    """

    library: ClassVar[str] = "apollo-torch"
    approximation: ClassVar[str | None] = "updates of matrices have the gradient's direction and low-rank scales"
    state_classes: ClassVar[Mapping[str, str]] = {"GradientProjector": "apollo_torch.random_projector"}
    library_module: ClassVar[str] = "apollo_torch"
    pip_extra: ClassVar[str] = "apollo"

    kind: Literal["apollo"] = "apollo"
    """Kind of optimizer."""
    scale: float = Field(default=1.0, gt=0)
    """The square root of it multiplies an update."""
    scale_of: Literal["channel", "tensor"] = "channel"
    """Unit that shares one scale."""

    def _get_library_class(self, library: ModuleType) -> Any:
        return library.APOLLOAdamW

    def _projection_kwargs(self) -> dict[str, Any]:
        return {"scale": self.scale, "scale_type": self.scale_of, "proj": "random", "proj_type": "std"}

    @contextmanager
    def meta_context(self, device_type: str) -> Iterator[None]:
        from apollo_torch import random_projector

        stable_randn = random_projector.stable_randn

        def empty(
            shape: tuple[int, ...], seed: int, device: torch.device | None = None, dtype: torch.dtype | None = None
        ) -> torch.Tensor:
            import torch

            return torch.empty(shape, device=device, dtype=dtype)

        random_projector.stable_randn = empty
        try:
            yield
        finally:
            random_projector.stable_randn = stable_randn

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        norms = sum(4 for group in param_groups if "rank" in group for _ in group["params"])  # of the previous step
        return super().state_bytes(param_groups) + norms
