"""Last-layer tuning: trains the output head, with three definitions of it.

The head of a causal language model is usually tied to the input embedding, so "train only the last layer" has two
meanings (untied, tied). A published study used a third (outside_blocks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftbench.errors import UnsupportedModelError
from peftbench.methods.base import Method, freeze

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GPT2_BLOCK_PREFIX = "transformer.h."


class LastLayer(Method):
    """Train the output head."""

    kind: Literal["last_layer"] = "last_layer"
    """Kind of method."""
    head: Literal["untied", "tied", "outside_blocks"] = "untied"
    """untied (a copy; backbone frozen), tied (shared with the embedding), outside_blocks (all but "transformer.h.")."""

    @property
    def has_frozen_backbone(self) -> bool:
        return self.head == "untied"

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Vocabulary times width (plus the head's bias); outside_blocks: every parameter outside the blocks."""
        if self.head == "outside_blocks":
            return sum(p.numel() for name, p in base.named_parameters() if GPT2_BLOCK_PREFIX not in name)
        return sum(parameter.numel() for parameter in _get_output_head(base).parameters())

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if self.head == "outside_blocks":
            return _freeze_gpt2_blocks(base)
        tied = _get_output_head(base).weight is base.get_input_embeddings().weight
        freeze(base.parameters())
        if self.head == "untied":
            _untie_head(base)
        elif not tied:
            raise UnsupportedModelError(
                f"method.head=tied needs a model that ties its head to its embedding, and {base.config.model_type} "
                f"from {base.name_or_path!r} does not; use method.head=untied"
            )
        for parameter in _get_output_head(base).parameters():
            parameter.requires_grad_(True)
        return base

    def set_training(self, model: nn.Module) -> None:
        # No dropout in a frozen backbone: its features are the same in every epoch and in evaluation.
        model.train(not self.has_frozen_backbone)


def _get_output_head(base: PreTrainedModel) -> nn.Linear:
    head = base.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{base.config.model_type} has no output head to train; use another method")
    return head  # type: ignore[no-any-return]


def _untie_head(base: PreTrainedModel) -> None:
    """Give the head its own copy of its weight, in this model and in its saved config."""
    from torch import nn

    head = _get_output_head(base)
    head.weight = nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def _freeze_gpt2_blocks(base: PreTrainedModel) -> PreTrainedModel:
    blocks = [parameter for name, parameter in base.named_parameters() if GPT2_BLOCK_PREFIX in name]
    if not blocks:
        raise UnsupportedModelError(
            f"method.head=outside_blocks freezes names with {GPT2_BLOCK_PREFIX!r}; {base.config.model_type} has none; "
            "use a GPT-2 model or method.head=untied"
        )
    freeze(blocks)
    return base
