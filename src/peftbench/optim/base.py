"""What every optimizer answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftbench.common.schema import ConfigSection

if TYPE_CHECKING:
    import torch
    from torch import nn

    Parameters = Iterable[nn.Parameter]

EMBEDDINGS_KEY = "embeddings"
"""Key of a parameter group that holds embeddings alone."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(ConfigSection):
    """What all optimizers have in common."""

    needs_matrices: ClassVar[bool] = False
    """Whether it does something else to a matrix than to the vector of its values."""
    weight_dtype: ClassVar[Literal["fp32", "bf16"]] = "fp32"
    """Type that the weights it steps are held in."""
    approximation: ClassVar[str | None] = None
    """Why its steps are no AdamW's, SGD's or Lion's but an approximation, None where they are."""

    kind: str
    """Which optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay on every trained tensor; decoupled, except SGD's."""

    @abstractmethod
    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        """A torch optimizer over ``parameters``, of which ``embeddings`` are embeddings' matrices.

        Raises:
            OptimizerError: the library it comes from is not installed, or cannot be used here.
        """

    def on_prepared(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Called once an engine has put its own tensors in place of the parameters, with the groups of them."""

    def meta_context(self) -> AbstractContextManager[None]:
        """Around steps on the meta device, where a library asks it for what it does not have."""
        return nullcontext()

    @abstractmethod
    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int | None:
        """Bytes of its states after a step over the tensors of ``groups``, in closed form; None where there is none."""


class AdamLike(Optimizer):
    """What the kin of Adam have in common."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


def tensor_sizes(param_groups: Sequence[dict[str, Any]]) -> list[tuple[int, bool]]:
    """Values of each tensor, and whether it is an embedding's that is kept apart."""
    return [
        (parameter.numel(), bool(group.get(EMBEDDINGS_KEY))) for group in param_groups for parameter in group["params"]
    ]
