"""The loss: cross-entropy summed over labelled tokens, to be divided by their number in the whole global batch.

A sum and not a mean: micro-batches differ in labelled tokens, and the mean of their means is not the mean over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

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
    """Computes the logits of all positions, and looks at those that are labelled."""

    computes_all_logits: ClassVar[bool] = True
    """Whether the head computes all positions."""

    def __init__(self, base: PreTrainedModel, *, use_masks: bool = False) -> None:
        """``masked``: leave attention as transformers does it."""
        self.base = base
        self.mask_reason = None if use_masks else find_mask_free_blocker(base)
        """Why attention is as transformers does it, None where it needs no mask."""
        self.uses_masks = use_masks or self.mask_reason is not None
        self.attention_fn: attention.AttentionFunction = attention.causal_attention
        """How it attends where there is no mask."""

    def attention_context(self) -> AbstractContextManager[None]:
        """Within it losses are computed, and all of their backward passes."""
        return nullcontext() if self.uses_masks else attention.mask_free_attention(self.base, self.attention_fn)

    def logits(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Logits that predict the labelled tokens: (labelled, vocabulary)."""
        everything: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
        return everything.flatten(0, 1)[batch.logit_indices]

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Sum of the cross-entropies (nats, float32) of every labelled token given what stands before it."""
        return cross_entropy(self.logits(model, batch).float(), batch.targets, reduction="sum")

    @torch.no_grad()
    def per_token(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The cross-entropy (nats, float32) of every labelled token, in the order of ``batch.targets``: (labelled,)."""
        return cross_entropy(self.logits(model, batch).float(), batch.targets, reduction="none")


class LabelledLogitsLoss(CausalLMLoss):
    """Shows the head those hidden states alone that predict a labelled token.

    The head's forward pass is replaced, within whatever wrappers the model has; where nothing follows it, it gives the
    loss itself, so that the logits of many labels are never all there.
    """

    computes_all_logits = False

    def __init__(
        self,
        base: PreTrainedModel,
        head: nn.Module,
        *,
        head_is_output: bool,
        use_masks: bool = False,
        kernel: Kernel = "torch",
    ) -> None:
        """``is_last``: what the head returns is what the model does. ``kernel`` computes the loss then."""
        super().__init__(base, use_masks=use_masks)
        self.head, self.cross_entropy_sum = head, KERNELS[kernel]()
        self.head_is_output = head_is_output and type(head) is nn.Linear
        self.select_positions: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = select_positions
        """What the head is given of the hidden states (rows, width, hidden size), for those of ``predictors``."""
        self._head_request: _HeadRequest | None = None
        self._head_forward = head.forward
        head.forward = partial(_forward_labelled_positions, self)

    def logits(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        with self._set_head_request(_HeadRequest(batch.logit_indices)):
            found: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
        return found.flatten(0, 1)

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        if not self.head_is_output:
            return super().__call__(model, batch)
        with self._set_head_request(_HeadRequest(batch.logit_indices, batch.targets)):
            summed: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
        return summed

    @torch.no_grad()
    def per_token(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        if not self.head_is_output:
            return super().per_token(model, batch)
        with self._set_head_request(_HeadRequest(batch.logit_indices, batch.targets, is_summed=False)):
            found: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
        return found

    @contextmanager
    def _set_head_request(self, request: _HeadRequest) -> Iterator[None]:
        self._head_request = request
        try:
            yield
        finally:
            self._head_request = None


@dataclass(frozen=True)
class _HeadRequest:
    """What the head is to compute: logits at ``predictors``, or the loss of ``targets`` there, summed or by token."""

    predictors: torch.Tensor
    targets: torch.Tensor | None = None
    is_summed: bool = True


def select_positions(hidden: torch.Tensor, predictors: torch.Tensor) -> torch.Tensor:
    """Hidden states at ``predictors``: (labelled, hidden size)."""
    return hidden.flatten(0, 1).index_select(0, predictors)


def _forward_labelled_positions(
    loss: LabelledLogitsLoss, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """A head's forward pass: (rows, positions, width) in; (1, labelled, vocabulary) or losses out."""
    asked = loss._head_request
    if asked is None:  # a generation's
        return loss._head_forward(hidden, *args, **kwargs)  # type: ignore[no-any-return]
    labelled = loss.select_positions(hidden, asked.predictors)
    if asked.targets is None:
        return loss._head_forward(labelled[None], *args, **kwargs)  # type: ignore[no-any-return]
    bias: torch.Tensor | None = loss.head.bias  # type: ignore[assignment]
    computed = loss.cross_entropy_sum if asked.is_summed else cross_entropy_per_token
    return computed(labelled, loss.head.weight, bias, asked.targets)  # type: ignore[arg-type]


def build_loss(
    base: PreTrainedModel, *, labelled_only: bool = True, use_masks: bool = False, kernel: Kernel = "torch"
) -> tuple[CausalLMLoss, tuple[str, ...]]:
    """The loss of a base with a method applied to it, and notes on what it could not spare.

    ``labelled``: spare the head all positions without a label; ``masked``: leave attention as transformers does it.

    Raises:
        UnsupportedModelError: another kernel than torch's is asked for, and the loss is not the head's to compute.
    """
    head = base.get_output_embeddings() if labelled_only else None
    of_head, of_model = _run_head_and_model(base, head) if head is not None else (None, None)
    loss: CausalLMLoss
    if head is not None and of_head is not None:
        loss = LabelledLogitsLoss(base, head, head_is_output=of_head is of_model, use_masks=use_masks, kernel=kernel)
    else:
        loss = CausalLMLoss(base, use_masks=use_masks)
    if kernel != "torch" and not (isinstance(loss, LabelledLogitsLoss) and loss.head_is_output):
        raise UnsupportedModelError(
            f"train.cross_entropy={kernel} needs train.logits=labels_only and a model that returns what its linear head "
            f"does; {base.config.model_type} is computed otherwise here; use train.cross_entropy=torch"
        )
    notes = []
    if labelled_only and loss.computes_all_logits:
        notes.append(f"the head of {base.config.model_type} was not found; logits are computed at every position")
    if loss.mask_reason:
        notes.append(f"attention is as transformers does it, padded and with masks: {loss.mask_reason}")
    return loss, tuple(notes)


@torch.no_grad()
def _run_head_and_model(base: PreTrainedModel, head: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What the head and what the model return for one token: the same, unless logits are capped, say, or scaled.

    Of the head it is None where its weight is used without its being called.
    """
    kept: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda _module, _given, output: kept.append(output))
    try:
        with isolated_forward(base):
            ids = torch.zeros((1, 1), dtype=torch.long, device=base.device)
            returned: torch.Tensor = base(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return (kept[-1] if kept else None), returned
