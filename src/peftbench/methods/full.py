"""Full fine-tuning: trains every weight of the base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from peftbench.methods.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Full(Method):
    """Train every weight of the base model."""

    freezes_weights: ClassVar[bool] = False

    kind: Literal["full"] = "full"
    """Kind of method."""

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Count all parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in base.parameters())

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        for parameter in base.parameters():
            parameter.requires_grad_(True)
        return base
