"""The frozen part of a model: everything below its lowest trained parameter, which never changes in training.

A forward pass of one token finds it: a hidden state requires a gradient if and only if a trained parameter is below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FrozenPart:
    """The part of a model below everything that is trained. It runs without dropout, with and without a feature cache.

    Either it is the whole backbone, or it ends with a transformer block, or it is empty.
    """

    is_backbone: bool = False
    """True if everything below the output head is frozen."""
    block_names: tuple[str, ...] = ()
    """Names of the frozen blocks, from the first; empty if the part is the whole backbone."""
    upper_block_names: tuple[str, ...] = ()
    """Names of the blocks above the part, from the lowest one."""
    names_above: frozenset[str] = frozenset()
    """Names of the modules that run only above the part."""
    obstacle: str | None = "nothing is trained"
    """Reason for which the part is empty; None if it is not."""

    @property
    def is_empty(self) -> bool:
        """True if the lowest trained parameter is in the first block or below it."""
        return self.obstacle is not None

    @property
    def has_all_blocks(self) -> bool:
        """True if no block has a backward pass."""
        return not self.is_empty and not self.upper_block_names

    @property
    def name(self) -> str:
        """Name of the last frozen block, or "backbone"."""
        return "backbone" if self.is_backbone else self.block_names[-1]

    def describe(self) -> str:
        """Return what the part consists of."""
        if self.is_backbone:
            return "frozen: everything below the output head"
        total = len(self.block_names) + len(self.upper_block_names)
        return f"frozen: the lowest {len(self.block_names)} of {total} blocks"

    def list_modules(self, base: PreTrainedModel) -> list[nn.Module]:
        """Return the modules of ``base`` that a step skips if it loads the states above them."""
        return [base.base_model] if self.is_backbone else [base.get_submodule(name) for name in self.block_names]

    def is_above(self, module_name: str) -> bool:
        """True if a module runs only above the part."""
        return module_name in self.names_above or any(
            module_name == block or module_name.startswith(f"{block}.") for block in self.upper_block_names
        )

    def set_training(self, model: nn.Module) -> None:
        """Set the blocks above the part to training mode, and everything else to evaluation mode."""
        model.train(self.is_empty)
        for name in self.upper_block_names:
            model.get_submodule(name).train()


def find_frozen_part(base: PreTrainedModel, blocks: list[tuple[str, nn.Module]] | str) -> FrozenPart:
    """Return the frozen part of a model whose trained parameters require a gradient.

    ``blocks`` are the transformer blocks with their names, or the reason why the model has no list of them.
    """
    trace = _Trace()
    with _evaluation_mode(base), trace.record(base, [] if isinstance(blocks, str) else blocks), torch.enable_grad():
        base(input_ids=torch.zeros((1, 1), dtype=torch.long, device=base.device), use_cache=False)
    if trace.head_input_needs_gradient is False:
        head = base.get_output_embeddings()
        above = frozenset(
            name for name, module in base.named_modules() if any(module is part for part in head.modules())
        )
        return FrozenPart(is_backbone=True, names_above=above, obstacle=None)
    if isinstance(blocks, str):
        return FrozenPart(obstacle=blocks)
    return _find_frozen_blocks(base, trace, [name for name, _ in blocks])


def _find_frozen_blocks(base: PreTrainedModel, trace: _Trace, names: list[str]) -> FrozenPart:
    if trace.calls != list(range(len(names))):
        return FrozenPart(obstacle=f"{base.config.model_type} does not run each of its blocks once, in order")
    needs = [given or returned for given, returned in zip(trace.inputs_need, trace.outputs_need, strict=True)]
    count = needs.index(True) if True in needs else len(names)
    if count < len(names) and trace.inputs_need[count]:
        return FrozenPart(obstacle=f"{_find_trained_name(base, trace)}, below all blocks, is trained")
    if count == 0:
        return FrozenPart(obstacle=f"{_find_trained_name(base, trace, names[0])}, in the first block, is trained")
    above = frozenset(trace.order[trace.ends[count - 1] :])
    return FrozenPart(False, tuple(names[:count]), tuple(names[count:]), above, None)


def _find_trained_name(base: PreTrainedModel, trace: _Trace, block: str | None = None) -> str:
    """Return the name of a trained parameter of ``block``, or of what runs before the first block."""
    early = set(trace.order[: trace.starts[0]])
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    if block is not None:
        found = [name for name in trained if name.startswith(f"{block}.")]
    else:
        found = [name for name in trained if name.rpartition(".")[0] in early]
    return (found or trained)[0]


@dataclass
class _Trace:
    """Calls of modules in a forward pass, recorded by hooks."""

    order: list[str] = field(default_factory=list)
    """Names of all modules in the order of their first call."""
    calls: list[int] = field(default_factory=list)
    """Indices of the blocks in the order of their calls."""
    starts: list[int] = field(default_factory=list)
    """For each call of a block: number of distinct modules that were called before it started."""
    ends: list[int] = field(default_factory=list)
    """For each call of a block: number of distinct modules that were called before it ended."""
    inputs_need: list[bool] = field(default_factory=list)
    """For each call of a block: True if an input requires a gradient."""
    outputs_need: list[bool] = field(default_factory=list)
    head_input_needs_gradient: bool | None = None
    """None if the head is not called."""

    @contextmanager
    def record(self, base: PreTrainedModel, blocks: list[tuple[str, nn.Module]]) -> Iterator[None]:
        """Record the forward passes of ``base`` in the context."""
        handles = []
        for index, (_, block) in enumerate(blocks):
            # Registered before the hooks of all modules, so that a block counts as a module that runs after its start.
            handles.append(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: self._enter_block(index, args, kwargs), with_kwargs=True
                )
            )
            handles.append(block.register_forward_hook(self._leave_block))
        seen: set[str] = set()
        for name, module in base.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name, seen)))
        if (head := base.get_output_embeddings()) is not None:
            handles.append(head.register_forward_pre_hook(self._enter_head))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, seen: set[str]) -> None:
        if name not in seen:
            seen.add(name)
            self.order.append(name)

    def _enter_block(self, index: int, args: Any, kwargs: Any) -> None:
        self.calls.append(index)
        self.starts.append(len(self.order))
        self.inputs_need.append(_needs_gradient((args, kwargs)))

    def _leave_block(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.ends.append(len(self.order))
        self.outputs_need.append(_needs_gradient(output))

    def _enter_head(self, _module: nn.Module, args: Any) -> None:
        self.head_input_needs_gradient = _needs_gradient(args)


def _needs_gradient(values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in tree_leaves(values))


@contextmanager
def _evaluation_mode(base: PreTrainedModel) -> Iterator[None]:
    """Set ``base`` to evaluation mode, and restore the mode of each module."""
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
