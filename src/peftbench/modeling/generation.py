"""The base model's generation_config: what decoding ignores of it, and how it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNUSED_KEYS = frozenset({*_TOKEN_KEYS, "max_length", "max_new_tokens", "use_cache", "decoder_start_token_id"})
"""Settings that a recipe has too, or that name tokens."""
_SAMPLING_KEYS = ("temperature", "top_p", "min_p", "top_h", "top_k", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAM_KEYS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")


def list_settings(config: GenerationConfig) -> list[str]:
    """Return the settings of decoding that differ from transformers' defaults, e.g. ``repetition_penalty=1.3``."""
    defaults = type(config)._get_default_generation_params()
    return [
        f"{key}={value}"
        for key, value in sorted(config.to_dict().items())
        if key in defaults and key not in _UNUSED_KEYS and value is not None and value != defaults[key]
    ]


@contextmanager
def default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, generation obeys its arguments and transformers' defaults, not the model's settings."""
    own = model.generation_config
    model.generation_config = type(own)(**{key: getattr(own, key) for key in _TOKEN_KEYS})
    try:
        yield
    finally:
        model.generation_config = own


def repair_generation_config(model: PreTrainedModel) -> str | None:
    """Remove settings with which transformers refuses to save the generation config; return a note that names them.

    Such a file is common: sampling settings without ``do_sample``. Without a repair a trained model cannot be saved.
    """
    config = model.generation_config
    if _is_valid(config):
        return None
    ignored = [*([] if config.do_sample else _SAMPLING_KEYS), *([] if (config.num_beams or 1) > 1 else _BEAM_KEYS)]
    removed = [f"{key}={getattr(config, key)}" for key in ignored if getattr(config, key, None) is not None]
    for key in ignored:
        setattr(config, key, None)
    if not _is_valid(config):
        removed = [f"{key}={value}" for key, value in sorted(config.to_diff_dict().items()) if key not in _TOKEN_KEYS]
        model.generation_config = type(config)(**{key: getattr(config, key) for key in _TOKEN_KEYS})
    return f"the saved generation_config.json omits {', '.join(removed)}, which transformers refuses to save"


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
