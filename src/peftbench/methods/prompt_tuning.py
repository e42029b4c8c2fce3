"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691) through peft: trained vectors in front of every sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peftbench.methods.base import Method
from peftbench.methods.soft_tokens import (
    add_packed_forward,
    check_architecture,
    check_generates_from_embeddings,
    generate_after_soft_tokens,
    get_embedding_width,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PromptTuning(Method):
    """Train soft tokens in front of every sequence."""

    keeps_base_frozen: ClassVar[bool] = True
    supports_quantized_base: ClassVar[bool] = True

    kind: Literal["prompt_tuning"] = "prompt_tuning"
    """Kind of method."""
    num_virtual_tokens: int = Field(default=20, gt=0)
    """Number of soft tokens; they occupy positions of the model."""
    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB"] = "RANDOM"
    """Initial values: random, the embeddings of prompt_tuning_init_text, or random embeddings of the vocabulary."""
    prompt_tuning_init_text: str | None = None
    """Text whose embeddings initialize the soft tokens with TEXT; repeated or cut to num_virtual_tokens."""

    @field_validator("prompt_tuning_init", mode="before")
    @classmethod
    def _upper_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_init_text(self) -> PromptTuning:
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise ValueError(
                "prompt_tuning_init: TEXT requires prompt_tuning_init_text; RANDOM and SAMPLE_VOCAB do not use it"
            )
        return self

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Count soft tokens times the width of the embedding."""
        return self.num_virtual_tokens * get_embedding_width(base)

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        from peft import PromptTuningConfig, get_peft_model

        check_architecture(base)
        text: dict[str, Any] = {}
        if self.prompt_tuning_init == "TEXT":
            text = {
                "prompt_tuning_init_text": self.prompt_tuning_init_text,
                "tokenizer_name_or_path": tokenizer.name_or_path,
            }
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init=self.prompt_tuning_init,  # type: ignore[arg-type]
            token_dim=get_embedding_width(base),  # peft defaults to hidden_size; OPT-350M's embedding is narrower
            # peft requires both numbers, which only prefix tuning uses; it does not find them in MPT's config.
            num_layers=base.config.num_hidden_layers,
            num_attention_heads=getattr(base.config, "num_attention_heads", None) or 1,
            **text,
        )
        model = get_peft_model(base, config)
        add_packed_forward(model, base)
        return model

    def check_generation(self, base: PreTrainedModel) -> None:
        check_generates_from_embeddings(base, self.kind)

    def generate(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, **generate_kwargs: Any
    ) -> torch.Tensor:
        return generate_after_soft_tokens(model, input_ids, attention_mask, **generate_kwargs)
