"""The config of the causal language model in a folder: configs of other models are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftbench.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def select_causal_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return ``config``, or the config of its text model if transformers loads that alone (e.g. Qwen3.5, Llama 4).

    A config without a causal language model is returned unchanged; loading its weights raises the error.

    Raises:
        UnsupportedModelError: the model is an encoder, an encoder-decoder, or multimodal with a text model that
            transformers cannot load on its own.
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} has an encoder and a decoder, so it is not a causal language model; set model.path to one that is"
        )
    # An encoder is trained to fill masks. With is_decoder (XLM: causal) it attends to earlier tokens only.
    is_causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_causal:
        raise UnsupportedModelError(
            f"{kind} attends to later tokens, so it is not a causal language model; set model.path to one that is"
        )
    text_config = getattr(config, "text_config", None)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not isinstance(text_config, PreTrainedConfig) or has_own_code:
        return config
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    is_loadable = type(text_config) in AutoModelForCausalLM._model_mapping
    if model_class is None or model_class.config_class is type(config) or not is_loadable:
        raise UnsupportedModelError(
            f"{kind} is multimodal, and transformers cannot load its text model (text_config in config.json) on its "
            "own; save the text model separately and set model.path to that folder"
        )
    if getattr(config, "quantization_config", None) is not None:
        text_config.quantization_config = config.quantization_config
        text_config.dtype = text_config.dtype or config.dtype
    return text_config


def is_part_of_multimodal(config: PreTrainedConfig) -> bool:
    """Return whether ``config`` is that of a text model whose folder can have weights for images and sound as well."""
    return getattr(config, "base_config_key", "") == "text_config" or config.model_type.endswith("_text")
