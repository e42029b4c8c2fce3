"""The roles of a model's trained parameters, by which some optimizers group them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.optim.lora_roles import LoraPair, find_lora_pairs

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ParameterRoles:
    """Trained parameters by their place in the model; the fields omit the final norm, most adapters and the like."""

    embeddings: tuple[nn.Parameter, ...] = ()
    """Embedding matrices, also those that are tied to the output head."""
    head: tuple[nn.Parameter, ...] = ()
    """Parameters of the output head."""
    blocks: tuple[tuple[nn.Parameter, ...], ...] = ()
    """Parameters of each transformer block, from the lowest block to the highest."""
    lora_pairs: tuple[LoraPair, ...] = ()
    """Pairs of LoRA's matrices A and B in which at least one is trained."""
    undecayed: tuple[nn.Parameter, ...] = ()
    """Biases and parameters of layer normalizations, which transformers' Trainer does not decay."""


NO_ROLES = ParameterRoles()
"""Roles of parameters outside of a transformer."""


def find_roles(model: nn.Module) -> ParameterRoles:
    """Return the roles of the parameters of ``model`` that require gradients."""
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

    modules = list(model.modules())
    heads = [one.get_output_embeddings() for one in modules if isinstance(one, PreTrainedModel)]
    head = next((one for one in heads if one is not None), None)
    blocks = [tuple(one for one in block if one.requires_grad) for block in list_blocks(model)]
    norms = [one for one in modules if isinstance(one, tuple(ALL_LAYERNORM_LAYERS))]
    in_norms = {id(parameter) for one in norms for parameter in one.parameters()}
    return ParameterRoles(
        embeddings=tuple(
            parameter for one in modules if isinstance(one, nn.Embedding) for parameter in _list_trained(one)
        ),
        head=_list_trained(head) if head is not None else (),
        blocks=tuple(parameters for parameters in blocks if parameters),
        lora_pairs=tuple(pair for pair in find_lora_pairs(model) if pair.a.requires_grad or pair.b.requires_grad),
        undecayed=tuple(
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ("bias" in name or id(parameter) in in_norms)
        ),
    )


def list_blocks(model: nn.Module) -> list[tuple[nn.Parameter, ...]]:
    """Return the parameters of each transformer block, from the lowest block to the highest."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [tuple(one.parameters()) for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]


def _list_trained(module: nn.Module) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
