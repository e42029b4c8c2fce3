"""Causal-LM loss: cross-entropy summed over labeled tokens; the loop divides by their number in the global batch.

A sum, not a mean: micro-batches differ in labeled tokens, so the mean of their means is not the mean over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from peftbench.errors import UnsupportedModelError
from peftbench.modeling import attention
from peftbench.modeling.cross_entropy import KERNELS, Kernel, cross_entropy_per_token
from peftbench.modeling.mask_free import find_mask_free_blocker, isolated_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.data.collate import MicroBatch


class CausalLMLoss:
    """Computes the logits of all positions and selects the labeled ones."""

    computes_all_logits: bool = True
    """True if the head computes logits at all positions."""

    def __init__(self, base: PreTrainedModel, *, use_masks: bool = False, mask_reason: str | None = None) -> None:
        """Initialize; ``use_masks`` or a ``mask_reason`` keep transformers' own attention with masks."""
        self.base = base
        self.mask_reason = None if use_masks else mask_reason or find_mask_free_blocker(base)
        """Reason for which the model needs transformers' attention with masks, None if it does not."""
        self.uses_masks = use_masks or self.mask_reason is not None
        self.attention_fn: attention.AttentionFunction = attention.causal_attention
        """Attention used without masks."""

    def attention_context(self) -> AbstractContextManager[None]:
        """Return the context in which the loss and its backward pass must run."""
        return nullcontext() if self.uses_masks else attention.mask_free_attention(self.base, self.attention_fn)

    def logits(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Return the logits that predict the labeled tokens: (labeled, vocabulary)."""
        all_logits: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
        return all_logits.flatten(0, 1)[batch.logit_indices]

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Return the cross-entropy (nats, float32) summed over labeled tokens."""
        return cross_entropy(self.logits(model, batch).float(), batch.targets, reduction="sum")

    @torch.no_grad()
    def per_token(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Return each labeled token's cross-entropy (nats, float32), ordered as ``batch.targets``: (labeled,)."""
        return cross_entropy(self.logits(model, batch).float(), batch.targets, reduction="none")


class LabeledLogitsLoss(CausalLMLoss):
    """Computes the head only at hidden states that predict a labeled token.

    Replaces the head's forward pass inside whatever wrappers the model has. If the head's output is the model's output,
    the head returns the loss itself, so the logits of all labels are never in memory at once.
    """

    computes_all_logits = False

    def __init__(
        self,
        base: PreTrainedModel,
        head: nn.Module,
        *,
        head_is_output: bool,
        use_masks: bool = False,
        mask_reason: str | None = None,
        kernel: Kernel = "torch",
    ) -> None:
        """Initialize; with ``head_is_output`` (the model returns the head's output) ``kernel`` computes the loss."""
        super().__init__(base, use_masks=use_masks, mask_reason=mask_reason)
        self.head, self.cross_entropy_sum = head, KERNELS[kernel]()
        self.head_is_output = head_is_output and type(head) is nn.Linear
        self.select_positions: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = select_positions
        """Selects the head's inputs from hidden states (rows, width, hidden size) and positions."""
        self._head_request: _HeadRequest | None = None
        self._head_forward = head.forward
        head.forward = partial(_forward_labeled_positions, self)

    def logits(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        with self._set_head_request(_HeadRequest(batch.logit_indices)):
            logits: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
        return logits.flatten(0, 1)

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        if not self.head_is_output:
            return super().__call__(model, batch)
        with self._set_head_request(_HeadRequest(batch.logit_indices, batch.targets)):
            loss: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
        return loss

    @torch.no_grad()
    def per_token(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        if not self.head_is_output:
            return super().per_token(model, batch)
        with self._set_head_request(_HeadRequest(batch.logit_indices, batch.targets, is_summed=False)):
            losses: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
        return losses

    @contextmanager
    def _set_head_request(self, request: _HeadRequest) -> Iterator[None]:
        self._head_request = request
        try:
            yield
        finally:
            self._head_request = None


@dataclass(frozen=True)
class _HeadRequest:
    """Request to the head: logits at ``predictors``, or the loss of ``targets`` there, summed or per token."""

    predictors: torch.Tensor
    targets: torch.Tensor | None = None
    is_summed: bool = True


def select_positions(hidden: torch.Tensor, predictors: torch.Tensor) -> torch.Tensor:
    """Return the hidden states at ``predictors``: (labeled, hidden size)."""
    return hidden.flatten(0, 1).index_select(0, predictors)


def _forward_labeled_positions(
    loss: LabeledLogitsLoss, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Replace a head's forward pass: (rows, positions, width) in; (1, labeled, vocabulary) or losses out."""
    request = loss._head_request
    if request is None:  # outside of a loss, e.g. in generation
        return loss._head_forward(hidden, *args, **kwargs)  # type: ignore[no-any-return]
    labeled = loss.select_positions(hidden, request.predictors)
    if request.targets is None:
        return loss._head_forward(labeled[None], *args, **kwargs)  # type: ignore[no-any-return]
    bias: torch.Tensor | None = loss.head.bias  # type: ignore[assignment]
    loss_fn = loss.cross_entropy_sum if request.is_summed else cross_entropy_per_token
    return loss_fn(labeled, loss.head.weight, bias, request.targets)  # type: ignore[arg-type]


def build_loss(
    base: PreTrainedModel,
    *,
    labeled_only: bool = True,
    use_masks: bool = False,
    mask_reason: str | None = None,
    kernel: Kernel = "torch",
) -> tuple[CausalLMLoss, tuple[str, ...]]:
    """Return the loss of a base model with a method applied, and notes on savings that the model does not support.

    ``labeled_only``: compute the head at labeled positions only. ``use_masks``: keep transformers' own attention with
    masks; a ``mask_reason`` (of a method) has the same effect.

    Raises:
        UnsupportedModelError: the kernel is not torch's, and the head cannot compute this model's loss.
    """
    head = base.get_output_embeddings() if labeled_only else None
    head_output, model_output = _run_head_and_model(base, head) if head is not None else (None, None)
    loss: CausalLMLoss
    if head is not None and head_output is not None:
        is_output = head_output is model_output
        loss = LabeledLogitsLoss(
            base, head, head_is_output=is_output, use_masks=use_masks, mask_reason=mask_reason, kernel=kernel
        )
    else:
        loss = CausalLMLoss(base, use_masks=use_masks, mask_reason=mask_reason)
    if kernel != "torch" and not (isinstance(loss, LabeledLogitsLoss) and loss.head_is_output):
        raise UnsupportedModelError(
            f"train.cross_entropy={kernel} needs train.logits=labels_only and a model that returns its linear head's "
            f"output unchanged, which {base.config.model_type} does not here; use train.cross_entropy=torch"
        )
    notes = []
    if labeled_only and loss.computes_all_logits:
        notes.append(
            f"the output head of {base.config.model_type} was not found; logits are computed at every position"
        )
    if loss.mask_reason:
        notes.append(f"attention runs in transformers, with padding and masks: {loss.mask_reason}")
    return loss, tuple(notes)


@torch.no_grad()
def _run_head_and_model(base: PreTrainedModel, head: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the head's and the model's output for one token: the same tensor unless e.g. logits are capped or scaled.

    The head's is None if the model uses its weight without calling it.
    """
    outputs: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with isolated_forward(base):
            ids = torch.zeros((1, 1), dtype=torch.long, device=base.device)
            logits: torch.Tensor = base(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return (outputs[-1] if outputs else None), logits
