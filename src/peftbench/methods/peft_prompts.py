"""Methods of peft that put trained vectors before the tokens of a sequence, or trained keys and values before those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import model_validator

from peftbench.methods.peft_method import PeftMethod
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


class PeftPrefix(PeftMethod):
    """Base class of sections of types that learn keys and values, which occupy a model's first positions."""

    merges_into_base: ClassVar[bool] = False
    family: ClassVar[str] = "prompt_tuning"
    num_virtual_tokens: int

    @property
    def occupied_positions(self) -> int:
        return self.num_virtual_tokens

    def load(self, model: nn.Module, save_directory: Path) -> None:
        super().load(model, save_directory)
        model.active_peft_config.inference_mode = True  # type: ignore[union-attr] # only the encoder's output was saved


class PeftSoftTokens(PeftPrefix):
    """Base class of sections of types that learn soft tokens through an encoder."""

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        init = getattr(self, "prompt_tuning_init", None)
        if getattr(init, "value", init) == "TEXT":
            raise ValueError("prompt_tuning_init=TEXT needs the tokenizer; use method.kind=prompt_tuning")
        return self

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        check_architecture(base)
        model = super().apply(base, tokenizer)
        add_packed_forward(model, base)
        return model

    def set_config_values(self, base: PreTrainedModel) -> dict[str, Any]:
        return {"token_dim": get_embedding_width(base)}

    def check_generation(self, base: PreTrainedModel) -> None:
        check_generates_from_embeddings(base, self.kind)

    def generate(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, **generate_kwargs: Any
    ) -> torch.Tensor:
        return generate_after_soft_tokens(model, input_ids, attention_mask, **generate_kwargs)
