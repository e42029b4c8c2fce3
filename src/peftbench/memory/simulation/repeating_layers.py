"""Find the repeating layers of a model, so that a simulation needs only a few of them.

The layers of a model with a sliding window or experts in every other layer repeat in pairs: a unit of the pattern is
one or more layers. The first and the last unit of a model may have more layers than the others.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MAX_PERIOD = 8
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "block_idx")
_INSTANCE_STATE = ("_", "training")
_IDENTITY = re.compile(r" at 0x[0-9a-f]+|\.\d+(?=\.)")
"""Addresses of objects, and indices of layers in names of modules."""


@dataclass(frozen=True)
class KeptLayers:
    """Some layers of a model, and the number of the unit to which each belongs."""

    indices: tuple[int, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True)
class LayerPattern:
    """Layers that repeat: ``extra_first`` + ``num_units`` * ``period`` + ``extra_last`` of them."""

    extra_first: int
    """Layers of the first unit in addition to the period."""
    period: int
    """Layers of a unit."""
    extra_last: int
    """Layers of the last unit in addition to the period."""
    num_units: int

    def keep_units(self, num_units: int) -> KeptLayers:
        """Return the layers of a model with ``num_units`` of these units: the first ones, and those of the last unit.

        Raises:
            ValueError: the model has fewer units.
        """
        if not 1 <= num_units <= self.num_units:
            raise ValueError(f"{num_units} of {self.num_units} units")
        start = self.extra_first + (num_units - 1) * self.period
        removed = (self.num_units - num_units) * self.period
        last = range(start, start + self.period + self.extra_last)
        tags = [unit for unit in range(num_units) for _ in range(self.period)]
        return KeptLayers(
            (*range(start), *(index + removed for index in last)),
            (*[0] * self.extra_first, *tags, *[num_units - 1] * self.extra_last),
        )


def list_transformer_layers(model: nn.Module) -> list[nn.Module]:
    """Return the transformer layers of a model in the order of its forward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def find_pattern(layers: Sequence[nn.Module]) -> LayerPattern | None:
    """Return the pattern with the fewest layers in four units; None if there is none."""
    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(describe_module(layer), len(numbers)) for layer in layers]
    candidates = (
        (extra + 4 * period, extra, period)
        for period in range(1, _MAX_PERIOD + 1)
        for extra in range(len(layers) - 4 * period)
        if kinds[extra:-period] == kinds[extra + period :]
    )
    best = min(candidates, default=None)
    if best is None:
        return None
    _, extra, period = best
    num_units, rest = divmod(len(layers) - extra, period)
    return LayerPattern(extra, period, rest, num_units)


def describe_module(module: nn.Module) -> Hashable:
    """Return what determines a module's operations: its submodules with their classes, settings and parameters.

    The index of a layer is left out. Two layers with equal descriptions allocate the same storages.
    """
    return tuple(
        (name, type(one).__qualname__, _describe_settings(one), _describe_tensors(one))
        for name, one in module.named_modules()
    )


def _describe_settings(module: nn.Module) -> Hashable:
    settings = []
    for name, value in vars(module).items():
        if name.startswith(_INSTANCE_STATE) or name in _INDEX_NAMES:
            continue
        if isinstance(value, (bool, int, float, str, type(None))):
            settings.append((name, value))
        elif isinstance(value, (dict, list, tuple)) and not isinstance(value, nn.Module):
            settings.append((name, _IDENTITY.sub("", str(value))))
    return tuple(settings)


def _describe_tensors(module: nn.Module) -> Hashable:
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return tuple((name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad) for name, tensor in tensors)


def keep_layers(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Reduce a model's config to these of its layers, in place."""
    total = config.num_hidden_layers
    for name, value in vars(config).items():
        if name in _LAYER_COUNTS and value == total:
            setattr(config, name, len(layers))
        elif isinstance(value, (list, tuple)) and len(value) == total:
            setattr(config, name, type(value)(value[index] for index in layers))
