"""DeepSpeed's optimizer for states in CPU memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftbench.errors import OptimizerError
from peftbench.optim.base import AdamLike, tensor_sizes
from peftbench.optim.roles import NO_ROLES, ParameterRoles
from peftbench.optim.torch_optimizers import AdamW

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


class DeepSpeedCPUAdam(AdamLike):
    """AdamW of DeepSpeed, vectorized for states in CPU memory; compiled on first use."""

    library: ClassVar[str] = "deepspeed"
    is_cpu_only: ClassVar[bool] = True
    is_common_fallback: ClassVar[bool] = True

    kind: Literal["deepspeed_cpu_adam"] = "deepspeed_cpu_adam"
    """Kind of optimizer."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam as Adam

        try:
            optimizer: torch.optim.Optimizer = Adam(
                list(parameters),
                lr=self.learning_rate,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                adamw_mode=True,
            )
        except RuntimeError as error:
            raise OptimizerError(
                f"deepspeed_cpu_adam could not be compiled ({str(error).splitlines()[0]}); install g++ and ninja, or "
                "use optimizer.kind=adamw"
            ) from error
        return optimizer

    def to_simulated(self) -> AdamW:
        return AdamW(learning_rate=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        return sum(8 * size for size, _ in tensor_sizes(param_groups))
