"""LISA: full fine-tuning of a few transformer blocks at a time, chosen at random."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.errors import OptimizerError
from peftbench.optim.base import AdamLike
from peftbench.optim.roles import NO_ROLES, ParameterRoles, list_blocks
from peftbench.optim.torch_optimizers import FUSED_DEVICES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftbench.optim.base import Parameters

_BLOCK_KEY = "block"
"""Key of a parameter group: the number of its block."""


class Lisa(AdamLike):
    """LISA (Pan et al. 2024, arXiv:2403.17919): AdamW of torch over embeddings, head, final norm and a few blocks.

    Every ``interval`` steps, blocks are chosen at random, by ``train.seed`` and the step. All other blocks are frozen
    and have no gradients and no states. A block that was frozen starts with new states when it is chosen again.
    """

    is_fused: ClassVar[bool] = True
    freezes_blocks: ClassVar[bool] = True
    approximation: ClassVar[str | None] = "each step trains a few blocks only"
    ddp_limitation: ClassVar[str | None] = "DDP lists the trained weights once, and LISA changes them"
    deepspeed_limitation: ClassVar[str | None] = "DeepSpeed ZeRO lists the trained weights once, and LISA changes them"
    dtensor_limitation: ClassVar[str | None] = "FSDP lists the trained weights once, and LISA changes them"
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw",)

    kind: Literal["lisa"] = "lisa"
    """Kind of optimizer."""
    num_blocks: int = Field(default=2, gt=0)
    """Number of blocks that a step trains."""
    interval: int = Field(default=20, gt=0)
    """Steps between choices of blocks."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        import torch

        trained = list(parameters)
        self._check_blocks(roles.blocks)
        in_blocks = {id(parameter) for block in roles.blocks for parameter in block}
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in in_blocks]}]
        groups += [{"params": list(block), _BLOCK_KEY: index} for index, block in enumerate(roles.blocks)]
        return torch.optim.AdamW(
            groups,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=all(parameter.device.type in FUSED_DEVICES for parameter in trained) or None,
        )

    def _check_blocks(self, blocks: Sequence[Sequence[nn.Parameter]]) -> None:
        """Check that all choices of blocks have equal FLOPs and equally many trained parameters.

        Raises:
            OptimizerError: the model has too few blocks, or blocks of several sizes.
        """
        if len(blocks) < self.num_blocks:
            raise OptimizerError(
                f"optimizer.num_blocks={self.num_blocks} is more than the {len(blocks)} blocks of this model; "
                "lower it, or use optimizer.kind=adamw"
            )
        if len({sum(parameter.numel() for parameter in block) for block in blocks}) > 1:
            raise OptimizerError(
                "optimizer.kind=lisa needs blocks of one size, so that all steps cost the same, and this model has "
                "blocks of several sizes; use optimizer.kind=adamw"
            )

    def choose_blocks(self, count: int, step: int, seed: int) -> set[int]:
        """Return the indices of the blocks, out of ``count``, that ``step`` (counted from 0) trains."""
        generator = random.Random(f"{seed}-{step // self.interval}")  # noqa: S311
        return set(generator.sample(range(count), self.num_blocks))

    def start_step(self, optimizer: torch.optim.Optimizer, step: int, seed: int) -> None:
        groups = [group for group in optimizer.param_groups if _BLOCK_KEY in group]
        chosen = self.choose_blocks(len(groups), step, seed)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group[_BLOCK_KEY] in chosen)
                if not parameter.requires_grad:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)

    @contextmanager
    def first_step(self, model: nn.Module, seed: int) -> Iterator[None]:
        blocks = list_blocks(model)
        self._check_blocks(blocks)
        chosen = self.choose_blocks(len(blocks), 0, seed)
        flags = [(p, p.requires_grad, index in chosen) for index, block in enumerate(blocks) for p in block]
        _set_flags((parameter, is_trained) for parameter, _, is_trained in flags)
        try:
            yield
        finally:
            _set_flags((parameter, before) for parameter, before, _ in flags)

    def list_notes(self, param_groups: Sequence[dict[str, Any]]) -> list[str]:
        count = sum(_BLOCK_KEY in group for group in param_groups)
        return [f"lisa trains {self.num_blocks} of {count} blocks at a time, chosen again every {self.interval} steps"]

    def list_plan_notes(self) -> list[str]:
        return ["the plan is for the blocks that lisa chooses first; the peak can differ for other blocks"]

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        trained = [p for group in param_groups for p in group["params"] if p.requires_grad]
        return sum(8 * parameter.numel() + 4 for parameter in trained)


def _set_flags(flags: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for parameter, is_trained in flags:
        parameter.requires_grad_(is_trained)
