"""LoRA+: AdamW with a higher learning rate for LoRA's matrices B than for A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.optim.base import AdamLike, tensor_sizes
from peftbench.optim.lora_roles import check_trained_b
from peftbench.optim.roles import NO_ROLES, ParameterRoles
from peftbench.optim.torch_optimizers import FUSED_DEVICES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftbench.optim.base import Parameters

_GROUP_KEY = "lora_plus"
"""Key of a parameter group that names its members."""


class LoraPlus(AdamLike):
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): torch's AdamW with a higher learning rate for B than for A.

    The groups are those of peft's ``create_loraplus_optimizer``. Matrices B, biases and other vectors have
    ``learning_rate`` times ``learning_rate_ratio``; A and all other matrices have ``learning_rate``, which trackers
    log. Biases in the group of B and layer normalizations have no weight decay. The authors advise a learning rate
    slightly below that of LoRA, e.g. half of it.
    """

    is_fused: ClassVar[bool] = True
    needs_lora: ClassVar[bool] = True
    approximation: ClassVar[str | None] = "the learning rate of LoRA's B is a multiple of that of A"
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw",)

    kind: Literal["lora_plus"] = "lora_plus"
    """Kind of optimizer."""
    learning_rate_ratio: float = Field(default=16.0, gt=0)
    """Learning rate of B divided by that of A."""
    embedding_learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate of A and B of adapted embeddings."""

    def prepare_model(self, model: nn.Module) -> None:
        check_trained_b(self.kind, model)

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        import torch

        trained = list(parameters)
        b_rate = self.learning_rate * self.learning_rate_ratio
        options = {
            "A": (self.learning_rate, self.weight_decay),
            "embeddings": (self.embedding_learning_rate, self.weight_decay),
            "B": (b_rate, self.weight_decay),
            "vectors": (b_rate, 0.0),
        }
        members: dict[str, list[nn.Parameter]] = {name: [] for name in options}
        group_names = _map_groups(roles)
        for parameter in trained:
            members[group_names.get(id(parameter), "B" if parameter.ndim == 1 else "A")].append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": members[name], "lr": rate, "weight_decay": decay, _GROUP_KEY: name}
            for name, (rate, decay) in options.items()
            if members[name]
        ]
        return torch.optim.AdamW(
            groups,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            fused=all(parameter.device.type in FUSED_DEVICES for parameter in trained) or None,
        )

    def list_notes(self, param_groups: Sequence[dict[str, Any]]) -> list[str]:
        rates = f"{self.learning_rate:g} for A and {self.learning_rate * self.learning_rate_ratio:g} for B"
        if any(group.get(_GROUP_KEY) == "embeddings" for group in param_groups):
            rates += f", and {self.embedding_learning_rate:g} for adapted embeddings"
        return [f"the peak learning rate of lora_plus is {rates}; trackers log that of A"]

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        return sum(8 * size + 4 for size, _ in tensor_sizes(param_groups))  # two moments and a step counter


def _map_groups(roles: ParameterRoles) -> dict[int, str]:
    """Return the group of each parameter whose shape does not determine its group, keyed by ``id``."""
    groups: dict[int, str] = {}
    for pair in roles.lora_pairs:
        if pair.is_embedding:
            groups |= {id(pair.a): "embeddings", id(pair.b): "embeddings"}
        else:
            groups[id(pair.b)] = "B"
    in_embeddings = {key for key, name in groups.items() if name == "embeddings"}
    undecayed = {id(p) for p in roles.undecayed if p.ndim == 1 or id(p) in groups} - in_embeddings
    return groups | dict.fromkeys(undecayed, "vectors")
