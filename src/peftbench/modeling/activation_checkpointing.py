"""Gradient checkpointing that ends, like the backward pass, at the lowest trained parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def enable_checkpointing(base: PreTrainedModel, **checkpoint_kwargs: object) -> None:
    """Make the backward pass recompute the blocks of ``base``; ``checkpoint_kwargs`` are those of torch's checkpoint.

    transformers also makes the embedding's output require a gradient, which only reentrant checkpointing needs. The
    backward pass would then continue through frozen blocks down to the embedding, so that is reverted.
    """
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False} | checkpoint_kwargs)
    base.disable_input_require_grads()
