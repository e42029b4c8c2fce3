"""A small copy of an architecture with random weights, for trials that would be slow on the model itself."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from peftbench.common.text import first_line
from peftbench.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NUM_LAYERS = 2
_MAX_EXPERTS = 8
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "intermediate_size", "num_attention_heads", "n_head", "num_key_value_heads")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class CopySize(NamedTuple):
    """Size of a copy of an architecture."""

    num_layers: int | None = NUM_LAYERS
    """None: as many as the architecture has."""
    max_width: int | None = 1024
    """A larger width is divided where the config allows it; None: widths are those of the architecture."""
    vocabulary: int = 512
    """Tokens, if the architecture has more."""


DEFAULT_SIZE = CopySize()


def build_small_copy(config: PreTrainedConfig, size: CopySize = DEFAULT_SIZE) -> PreTrainedModel:
    """Return a small model of the architecture with random float32 weights on the CPU.

    The global random state is not changed.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    import torch

    full = _reduce(config, size, factor=1)
    width = max(int(getattr(full, name, 0) or 0) for name in ("hidden_size", "n_embd"))
    factor = 1
    while size.max_width is not None and width // factor > size.max_width:
        factor *= 2
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(0)
        if factor > 1:
            with suppress(UnsupportedModelError):  # widths that the architecture ties together
                return _build(_reduce(config, size, factor))
        return _build(full)


def identify(config: PreTrainedConfig) -> str:
    """Return a string that is equal for all configs of the same architecture and sizes, however they were loaded."""
    ignored = {"architectures", "dtype", "torch_dtype", "name_or_path", "transformers_version", "quantization_config"}
    values = {key: value for key, value in config.to_dict().items() if key not in ignored and not key.startswith("_")}
    return json.dumps(values, sort_keys=True, default=str)


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    # The recipe has already allowed a config class from the model's folder.
    has_own_code = type(config).__module__.startswith("transformers_modules")
    error = Exception("no attention implementation fits")
    for attention in ("sdpa", "eager"):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=has_own_code
            )
        except Exception as refusal:  # any code of an architecture
            error = refusal
            continue
        model.eval()
        return model
    raise UnsupportedModelError(
        f"a small copy of {config.model_type}, on which a method is tried, cannot be built: {first_line(error)}; "
        "use method.kind=lora, prompt_tuning or full, which are not tried"
    )


def _reduce(config: PreTrainedConfig, size: CopySize, factor: int) -> PreTrainedConfig:
    """Return a copy of the config with fewer layers, tokens and experts, and with widths divided by ``factor``."""
    reduced = copy.deepcopy(config)
    if size.num_layers is not None:
        for name in _LAYER_COUNTS:
            _lower(reduced, name, size.num_layers)
        layer_types = getattr(reduced, "layer_types", None)
        if layer_types:
            kinds = list(dict.fromkeys(layer_types))[: size.num_layers]  # one layer of each kind
            reduced.layer_types = (kinds * size.num_layers)[: size.num_layers]
    _lower(reduced, "vocab_size", size.vocabulary)
    for name in _EXPERT_COUNTS:
        _lower(reduced, name, _MAX_EXPERTS)
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
