"""Hooks of a method that training calls in each step and checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftbench.methods.base import Method


class AfterOptimizerStep(Protocol):
    """Called after the optimizer's step, before the gradients are deleted."""

    def __call__(self, step: int, *, was_skipped: bool) -> None:
        """Handle a step; see :meth:`peftbench.methods.base.Method.after_optimizer_step`."""


def _ignore_step(step: int, *, was_skipped: bool) -> None:
    """Do nothing after a step."""


@dataclass(frozen=True)
class MethodHooks:
    """Hooks of a method, bound to the model that it was applied to. By default they do nothing."""

    compute_penalty: Callable[[], torch.Tensor | None] = lambda: None
    after_optimizer_step: AfterOptimizerStep = _ignore_step
    capture_state: Callable[[], dict[str, Any]] = dict
    load_state: Callable[[dict[str, Any]], None] = lambda _state: None

    @classmethod
    def bind(cls, method: Method, model: nn.Module) -> MethodHooks:
        """Return the hooks of ``method`` for ``model``."""
        return cls(
            partial(method.compute_penalty, model),
            partial(method.after_optimizer_step, model),
            partial(method.capture_state, model),
            partial(method.load_state, model),
        )

    def list_state_tensors(self) -> list[torch.Tensor]:
        """Return the tensors that the method keeps between steps."""
        return [leaf for leaf in tree_leaves(self.capture_state()) if hasattr(leaf, "untyped_storage")]


NO_HOOKS = MethodHooks()
"""The hooks of a method that only trains parameters."""
