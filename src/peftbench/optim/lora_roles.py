"""LoRA's matrices A and B in a model that peft has adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftbench.errors import OptimizerError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LoraPair:
    """The matrices of one adapted module, whose update is ``scaling`` times B A."""

    name: str
    """Name of the module."""
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    is_embedding: bool
    """True if the module is an embedding; B is then random at the start, and A is zero."""
    variant: str | None
    """Name of peft's class if the update is not ``scaling`` times a single product B A; None if it is."""


def find_lora_pairs(model: nn.Module) -> tuple[LoraPair, ...]:
    """Return the pairs of matrices A and B of LoRA in ``model``, in the order of its modules."""
    if not hasattr(model, "peft_config"):  # importing peft takes seconds
        return ()
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.lora.layer import LoraLayer

    pairs = []
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, layer in layers:
        for adapter, scaling in layer.scaling.items():
            if adapter in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
                pairs.append(LoraPair(name, a, b, scaling, is_embedding=True, variant=None))
            elif adapter in layer.lora_A and not isinstance(layer, AdaLoraLayer):  # its update is not B A
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                variant = _name_variant(layer, adapter)
                pairs.append(LoraPair(name, a, b, scaling, is_embedding=False, variant=variant))
    return tuple(pairs)


def _name_variant(layer: Any, adapter: str) -> str | None:  # noqa: ANN401
    """Return the name of peft's class for an update that is not that of LoRA or DoRA; None for those."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.lora.variants import DoraLinearVariant
    from torch import nn

    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, DoraLinearVariant):
        return type(variant).__name__
    if isinstance(layer, ParamWrapper):  # it stacks the matrices of several experts
        return type(layer).__name__
    matrices = (layer.lora_A[adapter], layer.lora_B[adapter])
    return next((type(one).__name__ for one in matrices if type(one) is not nn.Linear), None)


def check_trained_b(kind: str, model: nn.Module) -> tuple[LoraPair, ...]:
    """Return the pairs of ``model`` in which B is trained.

    Raises:
        OptimizerError: there are none.
    """
    pairs = tuple(pair for pair in find_lora_pairs(model) if pair.b.requires_grad)
    if not pairs:
        raise OptimizerError(
            f"optimizer.kind={kind} needs a method that trains the matrix B of LoRA, but this method does not; use "
            "method.kind=lora or optimizer.kind=adamw"
        )
    return pairs
