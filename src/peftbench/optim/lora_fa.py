"""LoRA-FA: LoRA's A is frozen, and the gradient of B is projected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from unittest.mock import patch

from peftbench.errors import OptimizerError
from peftbench.optim.base import AdamLike
from peftbench.optim.lora_roles import check_trained_b
from peftbench.optim.roles import NO_ROLES, ParameterRoles
from peftbench.optim.torch_optimizers import FUSED_DEVICES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftbench.optim.base import Parameters
    from peftbench.optim.lora_roles import LoraPair

_PROJECTED_KEY = "projected"
"""Key of the parameter group of matrices B."""


class LoraFA(AdamLike):
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): torch's AdamW over LoRA's B; A keeps its initial value.

    The gradient of B is multiplied by the inverse of ``scaling ** 2 A A^T``, so that the update of the full matrix is
    as close to its gradient as B alone allows. Gradients are clipped before that. A frozen A has no gradient and no
    states, and its input is not stored for the backward pass. Other trained parameters are stepped by AdamW alone.
    """

    is_fused: ClassVar[bool] = True
    needs_lora: ClassVar[bool] = True
    needs_matrices: ClassVar[bool] = True
    dtensor_limitation: ClassVar[str | None] = (
        "FSDP shards LoRA's A, and the projection of B's gradient needs the whole A"
    )
    approximation: ClassVar[str | None] = "LoRA's A is frozen, and B's gradient is multiplied by the inverse of A A^T"
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw",)

    kind: Literal["lora_fa"] = "lora_fa"
    """Kind of optimizer."""

    def prepare_model(self, model: nn.Module) -> None:
        for pair in check_trained_b(self.kind, model):
            if pair.is_embedding:
                raise OptimizerError(
                    "optimizer.kind=lora_fa keeps LoRA's A at its initial value, which is zero for the embedding "
                    f"{pair.name}; leave it out of method.target_modules, or use optimizer.kind=adamw"
                )
            if pair.variant is not None:
                raise OptimizerError(
                    "optimizer.kind=lora_fa needs one matrix A and one B in each adapted module, but peft adapts "
                    f"{pair.name} with {pair.variant}; leave it out of method.target_modules, or use "
                    "optimizer.kind=adamw"
                )
            pair.a.requires_grad_(False)

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        from peftbench.optim.lora_fa_adamw import LoraFAAdamW

        trained = list(parameters)
        trained_ids = {id(parameter) for parameter in trained}
        pairs = [pair for pair in roles.lora_pairs if id(pair.b) in trained_ids]
        b_ids = {id(pair.b) for pair in pairs}
        groups: list[dict[str, Any]] = [{"params": [pair.b for pair in pairs], _PROJECTED_KEY: True}]
        groups += [{"params": [parameter for parameter in trained if id(parameter) not in b_ids]}]
        return LoraFAAdamW(
            [group for group in groups if group["params"]],
            pairs,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=all(parameter.device.type in FUSED_DEVICES for parameter in trained) or None,
        )

    def list_notes(self, _param_groups: Sequence[dict[str, Any]]) -> list[str]:
        return ["lora_fa keeps LoRA's A at its initial value; gradients of B are clipped before they are projected"]

    @contextmanager
    def meta_context(self, device_type: str) -> Iterator[None]:
        from peftbench.optim import lora_fa_adamw

        def allocate_inverse(pair: LoraPair) -> torch.Tensor:
            return pair.b.new_empty((pair.b.shape[1], pair.b.shape[1]))

        with patch.object(lora_fa_adamw, "compute_inverse", allocate_inverse):
            yield

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        total = 0
        for group in param_groups:
            for parameter in group["params"]:  # two moments, a step counter, and the inverse
                inverse_size = parameter.shape[1] ** 2 if _PROJECTED_KEY in group else 0
                total += 4 * (2 * parameter.numel() + 1 + inverse_size)
        return total
