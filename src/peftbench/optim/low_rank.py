"""Optimizers that keep the moments of a matrix's gradient in a space of low rank."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.errors import OptimizerError
from peftbench.optim.base import AdamLike

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from peftbench.optim.base import Parameters


class _LowRank(AdamLike):
    needs_matrices: ClassVar[bool] = True
    library_module: ClassVar[str]
    pip_extra: ClassVar[str]
    """What of peftbench installs the library."""

    rank: int = Field(default=128, gt=0)
    """Rank that a matrix's gradient is projected to."""
    update_gap: int = Field(default=200, gt=0)
    """Steps after which the projection is made anew."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        try:
            library = import_module(self.library_module)
        except ImportError as error:
            raise OptimizerError(
                f"optimizer.kind={self.kind} needs {self.library_module.replace('_', '-')}; install peftbench[{self.pip_extra}]"
            ) from error
        trained = list(parameters)
        apart = {id(parameter) for parameter in embeddings}
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in apart and min(p.shape) > self.rank]
        chosen = {id(parameter) for parameter in matrices}
        projected = {
            "params": matrices,
            "rank": self.rank,
            "update_proj_gap": self.update_gap,
            **self._projection_kwargs(),
        }
        rest = {"params": [parameter for parameter in trained if id(parameter) not in chosen]}
        made: torch.optim.Optimizer = self._get_library_class(library)(
            [group for group in (projected, rest) if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        return made

    @abstractmethod
    def _get_library_class(self, library: ModuleType) -> Any:  # noqa: ANN401 — classes without types
        """The library's class."""

    @abstractmethod
    def _projection_kwargs(self) -> dict[str, Any]:
        """How matrices are projected, in the library's words."""

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
    """AdamW over gradients projected to a low rank (Zhao et al. 2024, arXiv:2403.03507); small matrices whole.

    From pytorch-optimizer, which corrects the bias of weight decay as it does that of a step.
    """

    approximation: ClassVar[str | None] = "steps of matrices are of low rank"
    library_module: ClassVar[str] = "pytorch_optimizer"
    pip_extra: ClassVar[str] = "optimizers"

    kind: Literal["galore"] = "galore"
    """Which optimizer."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on a projected step."""

    def _get_library_class(self, library: ModuleType) -> Any:  # noqa: ANN401
        return library.GaLore

    def _projection_kwargs(self) -> dict[str, Any]:
        return {"scale": self.scale, "projection_type": "std"}


class Apollo(_LowRank):
    """Gradients scaled as AdamW would in a random low-rank space (Zhu et al. 2024, arXiv:2412.05270).

    By the authors' package, whose licence is for non-commercial use (CC BY-NC). Rank 1 with one scale a tensor and
    ``scale=128`` is their APOLLO-Mini.
    """

    approximation: ClassVar[str | None] = "steps of matrices have the gradient's direction, and scales of low rank"
    library_module: ClassVar[str] = "apollo_torch"
    pip_extra: ClassVar[str] = "apollo"

    kind: Literal["apollo"] = "apollo"
    """Which optimizer."""
    scale: float = Field(default=1.0, gt=0)
    """A step is multiplied by its root."""
    scale_of: Literal["channel", "tensor"] = "channel"
    """What shares one scale."""

    def _get_library_class(self, library: ModuleType) -> Any:  # noqa: ANN401
        return library.APOLLOAdamW

    def _projection_kwargs(self) -> dict[str, Any]:
        return {"scale": self.scale, "scale_type": self.scale_of, "proj": "random", "proj_type": "std"}

    @contextmanager
    def meta_context(self) -> Iterator[None]:
        from apollo_torch import random_projector

        drawn = random_projector.stable_randn

        def shaped(
            shape: tuple[int, ...], seed: int, device: torch.device | None = None, dtype: torch.dtype | None = None
        ) -> torch.Tensor:
            import torch

            return torch.empty(shape, device=device, dtype=dtype)

        random_projector.stable_randn = shaped
        try:
            yield
        finally:
            random_projector.stable_randn = drawn

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        norms = sum(4 for group in param_groups if "rank" in group for _ in group["params"])  # of the step before
        return super().state_bytes(param_groups) + norms
