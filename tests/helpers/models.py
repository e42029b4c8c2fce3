"""Small base models with random weights, one of each kind of architecture that methods distinguish."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

POSITIONS = 64
"""Context length of every small base model: short enough that tests can fill it."""


def gpt2_config(**changes: Any) -> PreTrainedConfig:
    """Return a GPT-2 of two layers with a tied head.

    The initializer range is large: with small weights, training parts of a frozen model would hardly lower the loss.
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
    """Return a Llama of two layers with grouped-query attention."""
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
"""One architecture of each kind that methods distinguish: Conv1D or Linear, learned or rotary positions, tied or untied
head, with or without biases."""


def qwen3_config(**changes: Any) -> PreTrainedConfig:
    """Return a Qwen3 of two layers: it normalizes queries and keys, and its head_dim exceeds hidden size / heads."""
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
"""``ARCHITECTURES`` and Qwen3, for tests that apply to every causal language model."""


def random_base(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a base model with the same random weights every time, configured like ``load_model`` does."""
    from transformers import AutoModelForCausalLM

    config.use_cache = False
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Biases start at zero and norm weights at one; those values would hide a wrong sign or a missing term.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.pad_token_id = config.eos_token_id
    return model  # type: ignore[no-any-return]


def embeddings_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the matrix of the input embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def head_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the matrix of the output head."""
    weight = model.get_output_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def meta_base(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the architecture on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
