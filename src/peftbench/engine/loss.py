"""The loss: cross-entropy summed over labelled tokens, to be divided by their number in the whole global batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from peftbench.data.batches import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftbench.data.batches import MicroBatch


def logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits at the real positions, (rows, longest, vocabulary); those of virtual tokens in front are cut off."""
    output: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return output[:, -batch.input_ids.shape[1] :]


def summed_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Sum of the cross-entropies (nats, float32) of every labelled token given what stands before it.

    A sum and not a mean: micro-batches differ in labelled tokens, and the mean of their means is not the mean over all.
    """
    predicted = logits(model, batch)[:, :-1]
    return cross_entropy(
        predicted.flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
