"""AdamW over weights in bf16, rounded stochastically, from torchao.

A step of Adam is often smaller than half of what bf16 tells apart, and rounding to the nearest would lose it every
time; rounded up as often as it is near to the upper value, it is kept on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftbench.errors import OptimizerError
from peftbench.optim.base import Betas, sizes

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


_BLOCK = 256
"""Values that share one scale in an 8-bit state."""
_SMALLEST_8BIT = 4096
"""Values from which torchao keeps a tensor's states in 8 bits, if whole blocks of them."""


class _Rounded(Betas):
    weights: ClassVar[Literal["fp32", "bf16"]] = "bf16"
    of_library: ClassVar[str]

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        try:
            import torchao.optim
        except ImportError as error:
            raise OptimizerError(f"optimizer.kind={self.kind} needs torchao; install peftbench[optimizers]") from error
        import torch

        trained = list(parameters)
        library: Any = getattr(torchao.optim, self.of_library)

        class Eager(library):  # type: ignore[misc]
            def step(self, closure: Any = None) -> Any:  # noqa: ANN401 — as torch has it
                # On CPU compiling a step for every shape would take minutes.
                with torch.compiler.set_stance("force_eager"):
                    return super().step(closure)

        kind = library if all(parameter.is_cuda for parameter in trained) else Eager
        kind.__name__ = kind.__qualname__ = library.__name__
        made: torch.optim.Optimizer = kind(
            trained, lr=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay,
            bf16_stochastic_round=True,
        )  # fmt: skip
        return made


class AdamWBf16(_Rounded):
    """AdamW with weights and moments in bf16."""

    changes_trajectory: ClassVar[str | None] = "weights and moments are held in bf16, rounded stochastically"
    of_library: ClassVar[str] = "_AdamW"

    kind: Literal["adamw_bf16"] = "adamw_bf16"
    """Which optimizer."""

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        return sum(2 * 2 * size + 4 for size, _ in sizes(groups))


class AdamW8bitBf16(_Rounded):
    """AdamW with weights in bf16 and moments in 8 bits."""

    changes_trajectory: ClassVar[str | None] = "weights are held in bf16, rounded stochastically, and moments in 8 bits"
    of_library: ClassVar[str] = "AdamW8bit"

    kind: Literal["adamw8bit_bf16"] = "adamw8bit_bf16"
    """Which optimizer."""

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        total = 0
        for size, _ in sizes(groups):
            whole = size >= _SMALLEST_8BIT and size % _BLOCK == 0
            # Each state has a table of its own.
            total += 4 + 2 * (size + 4 * math.ceil(size / _BLOCK) + 4 * 256 if whole else 2 * size)
        return total
