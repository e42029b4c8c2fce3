"""Find the transformer layer to which an operation or a parameter belongs.

Forward hooks show which layer runs in the forward pass. In the backward pass, a hook on the output of a layer starts
the layer's operations, which last until the gradient of the previous layer's output exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from peftbench.profiler.memory import iter_tensors


class LayerTags:
    """Tags of a model's layers: several layers may share a tag."""

    def __init__(self, layers: Sequence[nn.Module] = (), tags: Sequence[int] = ()) -> None:
        """``layers`` are in the order of the forward pass, with one tag each. Without layers there are no tags."""
        self._tag_by_tensor: dict[int, int] = {}
        self._running: list[int] = []
        self._backward: int | None = None
        self._tagged = list(zip(layers, tags, strict=True))
        for layer, tag in self._tagged:
            for tensor in (*layer.parameters(), *layer.buffers()):
                for one in (tensor, *iter_tensors([getattr(tensor, "quant_state", None)])):
                    self._tag_by_tensor[id(one)] = tag

    def register_hooks(self) -> list[RemovableHandle]:
        """Follow the passes through the layers from now on; return handles that end it."""
        hooks = []
        for layer, tag in self._tagged:
            hooks.append(layer.register_forward_pre_hook(partial(self._enter, tag)))
            hooks.append(layer.register_forward_hook(partial(self._leave, tag)))
        return hooks

    def __bool__(self) -> bool:
        """True if there are layers."""
        return bool(self._tagged)

    @property
    def running(self) -> int | None:
        """Tag of the layer that runs, in the forward or in the backward pass; None outside of layers."""
        if self._running:
            return self._running[-1]
        return self._backward if _is_in_backward() else None

    def find(self, tensor: object) -> int | None:
        """Return the tag of a parameter, a buffer or a tensor of a parameter's quantization state; else None."""
        return self._tag_by_tensor.get(id(tensor))

    def _enter(self, tag: int, *_: object) -> None:
        self._running.append(tag)
        if not _is_in_backward():
            self._backward = None

    def _leave(self, tag: int, _layer: nn.Module, _inputs: object, output: object) -> None:
        self._running.pop()
        if _is_in_backward():  # a recomputation
            return
        self._backward = None
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._enter_backward, tag))

    def _enter_backward(self, tag: int, _gradient: torch.Tensor) -> None:
        self._backward = tag


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
