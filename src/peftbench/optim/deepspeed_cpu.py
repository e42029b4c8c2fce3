"""An optimizer for states that lie in the CPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from peftbench.errors import OptimizerError
from peftbench.optim.base import AdamLike, tensor_sizes

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


class DeepSpeedCPUAdam(AdamLike):
    """AdamW by DeepSpeed, vectorised for states that lie in the CPU's memory; compiled on first use."""

    kind: Literal["deepspeed_cpu_adam"] = "deepspeed_cpu_adam"
    """Which optimizer."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam as Adam

        try:
            made: torch.optim.Optimizer = Adam(
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
        return made

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        return sum(8 * size for size, _ in tensor_sizes(param_groups))
