"""Schedule-Free AdamW: a running average of the weights replaces a decay of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftbench.errors import OptimizerError
from peftbench.optim.base import AdamLike, Beta, tensor_sizes
from peftbench.optim.roles import NO_ROLES, ParameterRoles

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


class ScheduleFree(AdamLike):
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv:2405.15682), from the authors' package.

    Gradients are taken at an interpolation between the stepped weights and their average; the average is evaluated and
    saved. ``schedule.kind`` must be constant, with or without a warm-up. The authors' learning rates are 1 to 10
    times those of AdamW with a schedule.
    """

    library: ClassVar[str] = "schedulefree"
    averages_weights: ClassVar[bool] = True
    approximation: ClassVar[str | None] = "the evaluated and saved weights are an average over the steps"
    deepspeed_limitation: ClassVar[str | None] = (
        "DeepSpeed ZeRO steps copies of the weights, and averaging them would not change the model's weights"
    )
    dtensor_limitation: ClassVar[str | None] = "averaging DTensors is untested"
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw",)

    kind: Literal["schedule_free"] = "schedule_free"
    """Kind of optimizer."""
    betas: tuple[Annotated[float, Field(gt=0, lt=1)], Beta] = (0.9, 0.999)
    """Weight of the average in the interpolation, and decay rate of the second moment."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise OptimizerError(
                f"optimizer.kind={self.kind} needs schedulefree; install peftbench[optimizers]"
            ) from error
        optimizer: torch.optim.Optimizer = AdamWScheduleFree(
            list(parameters), lr=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    def list_notes(self, _param_groups: Sequence[dict[str, Any]]) -> list[str]:
        return ["training losses are those of the interpolated weights; the average is evaluated and saved"]

    def set_evaluation(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.eval()  # type: ignore[attr-defined]

    @contextmanager
    def evaluation_weights(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        # The library would compute the trained weights back from the average, with rounding, so they are copied.
        groups = optimizer.param_groups
        copies = [[parameter.detach().to("cpu", copy=True) for parameter in group["params"]] for group in groups]
        self.set_evaluation(optimizer)
        try:
            yield
        finally:
            optimizer.train()  # type: ignore[attr-defined]
            for group, saved in zip(groups, copies, strict=True):
                for parameter, value in zip(group["params"], saved, strict=True):
                    parameter.data.copy_(value)

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        return sum(8 * size for size, _ in tensor_sizes(param_groups))  # the stepped weights and the second moment
