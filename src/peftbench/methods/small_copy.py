"""A small copy of an architecture with random weights, to try on it what would be slow or late on the model itself."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NUM_LAYERS = 2
_VOCABULARY = 512
_MAX_WIDTH = 1024
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "intermediate_size", "num_attention_heads", "n_head", "num_key_value_heads")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_small_copy(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """Return a model with two layers and a small vocabulary, with random float32 weights on the CPU.

    Widths are those of the architecture; a width above 1,024 is divided where the config allows it. The global random
    state is not changed.
    """
    import torch

    full = _reduce(config, factor=1)
    width = max(int(getattr(full, name, 0) or 0) for name in ("hidden_size", "n_embd"))
    factor = 1
    while width // factor > _MAX_WIDTH:
        factor *= 2
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        if factor > 1:
            with suppress(ValueError, RuntimeError, AssertionError):  # widths that the architecture ties together
                return _build(_reduce(config, factor), attention)
        return _build(full, attention)


def identify(config: PreTrainedConfig) -> str:
    """Return a text that is equal for configs of the same architecture and sizes, however the model was loaded."""
    ignored = {"architectures", "dtype", "torch_dtype", "name_or_path", "transformers_version", "quantization_config"}
    values = {key: value for key, value in config.to_dict().items() if key not in ignored and not key.startswith("_")}
    return json.dumps(values, sort_keys=True, default=str)


def _build(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    model.eval()
    return model


def _reduce(config: PreTrainedConfig, factor: int) -> PreTrainedConfig:
    """Return a copy of the config with two layers, a small vocabulary, and widths divided by ``factor``."""
    reduced = copy.deepcopy(config)
    for name in _LAYER_COUNTS:
        _lower(reduced, name, NUM_LAYERS)
    layer_types = getattr(reduced, "layer_types", None)
    if layer_types:
        kinds = list(dict.fromkeys(layer_types))[:NUM_LAYERS]  # one layer of each kind
        reduced.layer_types = (kinds * NUM_LAYERS)[:NUM_LAYERS]
    _lower(reduced, "vocab_size", _VOCABULARY)
    for name in _TOKEN_IDS:
        value: Any = getattr(reduced, name, None)
        if isinstance(value, int) and value >= reduced.vocab_size:
            setattr(reduced, name, 0)
    if factor > 1:
        for name in _WIDTHS:
            if value := getattr(reduced, name, None):
                setattr(reduced, name, max(1, int(value) // factor))
    reduced.quantization_config = None
    return reduced


def _lower(config: PreTrainedConfig, name: str, limit: int) -> None:
    value = getattr(config, name, None)
    if isinstance(value, int) and value > limit:
        setattr(config, name, limit)
