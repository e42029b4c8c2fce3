"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691) through peft: trained vectors in front of every sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peftbench.errors import UnsupportedModelError
from peftbench.methods.base import Method

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
        return self.num_virtual_tokens * _get_embedding_width(base)

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        from peft import PromptTuningConfig, get_peft_model

        if getattr(base.config, "hidden_size_per_layer_input", None):
            raise UnsupportedModelError(
                f"{base.config.model_type} looks up embeddings for each layer by token, and soft tokens have none; use "
                "another method, e.g. method.kind=lora"
            )
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
            token_dim=_get_embedding_width(base),  # peft defaults to hidden_size; OPT-350M's embedding is narrower
            # peft requires both numbers, which only prefix tuning uses; it does not find them in MPT's config.
            num_layers=base.config.num_hidden_layers,
            num_attention_heads=getattr(base.config, "num_attention_heads", None) or 1,
            **text,
        )
        model = get_peft_model(base, config)
        model.word_embeddings = base.get_input_embeddings()  # type: ignore[assignment] # peft picks a parameter with vocab_size rows
        model.forward = partial(_forward_packed, model, model.forward)  # type: ignore[method-assign]
        return model

    def check_generation(self, base: PreTrainedModel) -> None:
        if "inputs_embeds" not in inspect.signature(base.prepare_inputs_for_generation).parameters:  # type: ignore[arg-type]
            raise UnsupportedModelError(
                f"{base.config.model_type} generates only from token ids, but prompt tuning needs embeddings; set "
                "evaluate.metrics=[], or use another method, e.g. method.kind=lora"
            )

    def generate(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, **generate_kwargs: Any
    ) -> torch.Tensor:
        # peft puts the soft tokens before the padding and drops the position ids, so that a prompt's distance from
        # them, and its generated text, would depend on the rest of the batch. Here they directly precede the prompt.
        import torch

        base: PreTrainedModel = model.get_base_model()  # type: ignore[operator]
        soft: torch.Tensor = model.get_prompt(len(input_ids))  # type: ignore[operator]
        embedded = base.get_input_embeddings()(input_ids)
        mask = torch.cat((attention_mask.new_ones(soft.shape[:2]), attention_mask), dim=1)
        mask, order = mask.sort(dim=1, stable=True)  # padding first; a stable sort keeps the rest in order
        embeddings = torch.cat((soft.to(embedded.dtype), embedded), dim=1).take_along_dim(order[:, :, None], dim=1)
        # Without input_ids, transformers returns only the new tokens.
        new: torch.Tensor = base.generate(inputs_embeds=embeddings, attention_mask=mask, **generate_kwargs)  # type: ignore[operator]
        return new


def _get_embedding_width(base: PreTrainedModel) -> int:
    return int(base.get_input_embeddings().weight.shape[1])  # type: ignore[index,union-attr]


def _forward_packed(
    model: Any,
    peft_forward: Callable[..., Any],
    *,
    virtual_token_indices: torch.Tensor | None = None,
    **model_inputs: Any,
) -> Any:
    """Run a forward pass in which each document of a row has its own soft tokens.

    ``virtual_token_indices`` (documents x tokens,) are their positions in the row. peft supports only one place, before
    the first token of a row; its forward pass is used if there are no indices.
    """
    import torch

    if virtual_token_indices is None:
        return peft_forward(**model_inputs)
    base: PreTrainedModel = model.get_base_model()
    embedded = base.get_input_embeddings()(model_inputs.pop("input_ids"))
    # Like peft's get_prompt, which copies the token indices from the CPU on each call and so waits for the GPU.
    tokens = torch.arange(model.active_peft_config.num_virtual_tokens, device=virtual_token_indices.device)
    soft = model.prompt_encoder[model.active_adapter](tokens.repeat(len(virtual_token_indices) // len(tokens)))
    return base(
        inputs_embeds=embedded.index_copy(1, virtual_token_indices, soft.to(embedded.dtype)[None]), **model_inputs
    )
