"""Every type of peft as a method for tiny models, and the five families on which it is tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftbench.methods import METHOD_KINDS
from peftbench.methods.base import Method
from peftbench.methods.peft_kinds import PRESETS, TYPES
from tests.helpers.models import gpt2_config, llama_config, qwen3_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

_TINY_KEYS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 3},
    "ADAMSS": {"r": 16},
    "C3A": {"block_size": 8},
    "CORDA": {"r": 4, "corda_config": {"init_examples": 10}},
    "EVA": {"r": 4, "eva_config": {"init_examples": 10, "tau": 0.5}},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "FOURIERFT": {"n_frequency": 100},
    "LORA_GA": {"r": 4, "lora_ga_config": {"init_examples": 10}},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 16},
    "PSOFT": {"r": 8},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": (3, 10, 17)},
    "VBLORA": {"vector_length": 16},
    "WAVEFT": {"n_frequency": 100},
}
"""Keys of types whose defaults are too large for a tiny model, or that have no defaults."""
COMPUTED = ("CORDA", "EVA", "LORA_GA")
"""Initializations of LoRA from training examples; :func:`build_method` accepts their names like those of types."""
_PRESET_OF_TYPE = {preset.peft_type: kind for kind, preset in PRESETS.items() if preset.peft_type != "LORA"}
_PRESET_OF_TYPE |= {name: name.lower() for name in COMPUTED}


def build_method(peft_type: str, **keys: Any) -> Method:
    """Return a method of this type for a tiny model."""
    values = _TINY_KEYS.get(peft_type, {}) | keys
    kind = _PRESET_OF_TYPE.get(peft_type)
    if kind is not None:
        return METHOD_KINDS[kind].model_validate(values)
    section = METHOD_KINDS["peft"].select_section({"type": peft_type})
    return section(**values)


ALL_TYPES = sorted(TYPES)


def _gemma3_config() -> PreTrainedConfig:
    from transformers import Gemma3TextConfig

    keys: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
    }
    return Gemma3TextConfig(**keys, **heads, pad_token_id=0, bos_token_id=0, eos_token_id=0)


def _gpt_neox_config() -> PreTrainedConfig:
    from transformers import GPTNeoXConfig

    keys: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return GPTNeoXConfig(**keys, num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": gpt2_config,
    "llama": llama_config,
    "qwen3": qwen3_config,
    "gemma3": _gemma3_config,
    "gpt_neox": _gpt_neox_config,
}
"""Conv1D, grouped queries, normalized queries, layers of two kinds, and one matrix for queries, keys and values."""
LINEAR_FAMILIES = tuple(name for name in FAMILIES if name != "gpt2")
