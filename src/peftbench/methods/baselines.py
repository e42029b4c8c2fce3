"""Baselines: results without training, for comparison with the methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from peftbench.methods.base import Method, freeze

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ZeroShot(Method):
    """The base model as loaded."""

    is_trainable: ClassVar[bool] = False
    keeps_base_frozen: ClassVar[bool] = True
    supports_quantized_base: ClassVar[bool] = True

    kind: Literal["zero_shot"] = "zero_shot"
    """Kind of method."""

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        return 0

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        freeze(base.parameters())
        return base


class Lead(Method):
    """The first sentences of the article, the strongest simple baseline on news (See et al. 2017 copy three)."""

    is_trainable: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    freezes_weights: ClassVar[bool] = False

    kind: Literal["lead"] = "lead"
    """Kind of method."""
    sentences: int = Field(default=3, gt=0)
    """Number of sentences to copy."""

    def extract_summary(self, article: str) -> str:
        from peftbench.data.sentences import split_prose_sentences

        return " ".join(split_prose_sentences(article)[: self.sentences])
