"""AdamW over weights in bf16, rounded stochastically, from torchao.

A step of Adam is often smaller than half of what bf16 tells apart, and rounding to the nearest would lose it every
time; rounded up as often as it is near to the upper value, it is kept on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftbench.errors import OptimizerError
from peftbench.optim.base import EMBEDDINGS_KEY, AdamLike, tensor_sizes

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


_BLOCK_SIZE = 256
"""Values that share one scale in an 8-bit state."""
_MIN_8BIT_SIZE = 4096
"""Values from which torchao keeps a tensor's states in 8 bits, if whole blocks of them."""


class _StochasticRounding(AdamLike):
    weight_dtype: ClassVar[Literal["fp32", "bf16"]] = "bf16"
    library_class: ClassVar[str]

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        try:
            import torchao.optim
        except ImportError as error:
            raise OptimizerError(f"optimizer.kind={self.kind} needs torchao; install peftbench[optimizers]") from error
        trained = list(parameters)
        apart = {id(parameter) for parameter in embeddings} if self._has_32bit_embeddings() else set()
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in apart]}]
        groups += [{"params": [p for p in trained if id(p) in apart], EMBEDDINGS_KEY: True}]
        kind = _build_subclass(
            getattr(torchao.optim, self.library_class), apart, all(parameter.is_cuda for parameter in trained)
        )
        made: torch.optim.Optimizer = kind(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            bf16_stochastic_round=True,
        )
        return made

    def _has_32bit_embeddings(self) -> bool:
        return False


def _build_subclass(library_class: Any, fp32_parameter_ids: set[int], can_compile: bool) -> Any:  # noqa: ANN401 — classes of torchao's
    """The library's class, with 32-bit states for the parameters of these addresses."""
    import torch

    class Adapted(library_class):  # type: ignore[misc]
        def _new_buffer(self, parameter: torch.Tensor, signed: bool) -> torch.Tensor:
            if id(parameter) in fp32_parameter_ids:
                return torch.zeros_like(parameter, dtype=torch.float32)
            made: torch.Tensor = super()._new_buffer(parameter, signed)
            return made

        def step(self, closure: Any = None) -> Any:  # noqa: ANN401 — as torch has it
            # On CPU compiling a step for every shape would take minutes.
            with nullcontext() if can_compile else torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    Adapted.__name__ = Adapted.__qualname__ = library_class.__name__
    return Adapted


class AdamWBf16(_StochasticRounding):
    """AdamW with weights and moments in bf16."""

    approximation: ClassVar[str | None] = "weights and moments are held in bf16, rounded stochastically"
    library_class: ClassVar[str] = "_AdamW"

    kind: Literal["adamw_bf16"] = "adamw_bf16"
    """Which optimizer."""

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        return sum(2 * 2 * size + 4 for size, _ in tensor_sizes(param_groups))


class AdamW8bitBf16(_StochasticRounding):
    """AdamW with weights in bf16 and moments in 8 bits."""

    approximation: ClassVar[str | None] = "weights are held in bf16, rounded stochastically, and moments in 8 bits"
    library_class: ClassVar[str] = "AdamW8bit"

    kind: Literal["adamw8bit_bf16"] = "adamw8bit_bf16"
    """Which optimizer."""
    embeddings_32bit: bool = True
    """Keep the states of embeddings in 32 bits, as adamw8bit does; false has 8 bits everywhere."""

    def _has_32bit_embeddings(self) -> bool:
        return self.embeddings_32bit

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        total = 0
        for size, embedding in tensor_sizes(param_groups):
            if embedding:
                total += 4 + 2 * 4 * size
                continue
            whole = size >= _MIN_8BIT_SIZE and size % _BLOCK_SIZE == 0
            # Each state has a table of its own.
            total += 4 + 2 * (size + 4 * math.ceil(size / _BLOCK_SIZE) + 4 * 256 if whole else 2 * size)
        return total
