"""Full fine-tuning: every weight of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftbench.methods.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Full(Method):
    """Train every weight of the base."""

    kind: Literal["full"] = "full"
    """Which method."""

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """All of them; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in base.parameters())

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        for parameter in base.parameters():
            parameter.requires_grad_(True)
        return base
