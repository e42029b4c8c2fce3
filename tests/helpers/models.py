"""Small bases with random weights, one of each kind of architecture that must be told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

POSITIONS = 64
"""Positions of every small base: short enough to be filled to the last one."""


def gpt2_config(**changes: Any) -> PreTrainedConfig:
    """A GPT-2 of two layers that ties its head, as all GPT-2 do.

    Its weights are drawn wide, or a frozen trunk under a frozen head could lower no loss by more than a hair.
    """
    from transformers import GPT2Config

    values: dict[str, Any] = {
        "vocab_size": 4096,
        "n_positions": POSITIONS,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2Config(**values | changes)


def llama_config(**changes: Any) -> PreTrainedConfig:
    """A Llama of two layers with grouped keys and values."""
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": 4096,
        "max_position_embeddings": POSITIONS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return LlamaConfig(**values | changes)


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2_tied": gpt2_config,
    "llama_tied": lambda: llama_config(tie_word_embeddings=True),
    "llama_untied": lambda: llama_config(tie_word_embeddings=False, attention_bias=True),
}
"""One of each kind that methods must tell apart: Conv1D or Linear, learnt or rotary positions, tied or untied head,
with biases or without."""


def qwen3_config(**changes: Any) -> PreTrainedConfig:
    """A Qwen3 of two layers, which normalises queries and keys, with heads wider than their share."""
    from transformers import Qwen3Config

    values: dict[str, Any] = {
        "vocab_size": 4096,
        "max_position_embeddings": POSITIONS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return Qwen3Config(**values | changes)


FAMILIES = ARCHITECTURES | {"qwen3": qwen3_config}
"""With one more, for what must hold of any causal language model and not of the kinds that methods tell apart."""


def random_base(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a base model with the same random weights every time, set up as ``load_model`` does."""
    from transformers import AutoModelForCausalLM

    config.use_cache = False
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Biases start at zero and gains at one, where a wrong sign or a missing term could hide.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.pad_token_id = config.eos_token_id
    return model  # type: ignore[no-any-return]


def embeddings_of(model: PreTrainedModel) -> torch.Tensor:
    """The input embedding's matrix."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def head_of(model: PreTrainedModel) -> torch.Tensor:
    """The output head's matrix."""
    weight = model.get_output_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def meta_base(config: PreTrainedConfig) -> PreTrainedModel:
    """The architecture without any weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
