"""torch's AdamW with the projected gradients of LoRA-FA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peftbench.optim.lora_roles import LoraPair

INVERSE_KEY = "inverse"
"""Key of the inverse in the state of a matrix B."""


class LoraFAAdamW(torch.optim.AdamW):
    """Multiplies the gradient of each B by the inverse of ``scaling ** 2 A A^T``, and then steps as AdamW."""

    def __init__(self, groups: list[dict[str, Any]], pairs: Sequence[LoraPair], **options: Any) -> None:  # noqa: ANN401
        super().__init__(groups, **options)
        self._pairs = {pair.b: pair for pair in pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Project the gradients of all B in place, and step all parameters."""
        inverses = {}
        for parameter, pair in self._pairs.items():
            if parameter.grad is not None:
                # A is constant, so its inverse is computed once; a checkpoint contains it, like all states.
                inverse = self.state[parameter].get(INVERSE_KEY)
                inverses[parameter] = inverse = compute_inverse(pair) if inverse is None else inverse
                parameter.grad.copy_(parameter.grad @ inverse)
        loss = super().step(closure)
        for parameter, inverse in inverses.items():
            self.state[parameter][INVERSE_KEY] = inverse  # AdamW initializes only states that are empty
        return loss


def compute_inverse(pair: LoraPair) -> torch.Tensor:
    """Return the pseudoinverse of ``scaling ** 2 A A^T``, in float32 on the device of B.

    It is computed in float64 on the CPU: its rounded values are then the same on all ranks, and a GPU's solver needs no
    memory. Singular values that are zero in float32 count as zero.
    """
    a = pair.a.detach().to("cpu", torch.float64)
    tolerance = len(a) * torch.finfo(torch.float32).eps
    inverse: torch.Tensor = torch.linalg.pinv(a @ a.T, rtol=tolerance, hermitian=True) / pair.scaling**2
    return inverse.to(pair.b.device, torch.float32)
