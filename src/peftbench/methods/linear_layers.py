"""Replace transformers' Conv1D, the linear layer of GPT-2, by torch's Linear, and back.

Both compute the same product; Conv1D stores its matrix transposed. Many methods of peft adapt Linear only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def has_conv1d(model: nn.Module) -> bool:
    """True if the model has a Conv1D layer."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def replace_conv1d(model: nn.Module) -> list[str]:
    """Replace every Conv1D by a Linear with the same values, in place, and return their names."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name in names:
        layer = model.get_submodule(name)
        _set_submodule(model, name, _build_linear(layer.weight, layer.bias))  # type: ignore[arg-type]
    return names


def restore_conv1d(model: nn.Module, names: list[str]) -> None:
    """Replace the Linear layers with these names by Conv1D with the same values, in place."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        restored = Conv1D(layer.out_features, layer.in_features)
        restored.weight = _transpose(layer.weight)
        restored.bias = layer.bias
        _set_submodule(model, name, restored)


def _build_linear(weight: nn.Parameter, bias: nn.Parameter) -> nn.Linear:
    from torch import nn

    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight, linear.bias = _transpose(weight), bias
    return linear


def _transpose(weight: torch.Tensor) -> nn.Parameter:
    from torch import nn

    return nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), attribute, module)
