"""Attention implementations by their names in transformers: which an architecture has, and which ``auto`` selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftbench.common.text import first_line
from peftbench.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from peftbench.recipe.schema import Model

AttentionImplementation = Literal["flash_attention_2", "sdpa", "eager"]


def select_attention(
    model_config: Model, config: PreTrainedConfig, model_path: str, *, flash_obstacle: str | None
) -> tuple[AttentionImplementation, str]:
    """Return the implementation that ``model.attention=auto`` means, and the reason as a clause.

    ``model_path`` is the folder or Hub name of the model. ``flash_obstacle`` states why the device or the precision
    rules out flash attention; None if both support it. For a config without a causal language model the result is
    "sdpa"; loading raises the error.
    """
    supported = list_attention_implementations(model_config, config, model_path)
    if "flash_attention_2" in supported and flash_obstacle is None:
        return "flash_attention_2", "flash-attn is installed"
    if "sdpa" in supported or not supported:
        return "sdpa", flash_obstacle or f"{config.model_type} does not support flash attention"
    return "eager", f"{config.model_type} does not support sdpa"


def check_attention(model_config: Model, config: PreTrainedConfig, model_path: str) -> None:
    """Check that the architecture has the implementation of ``model.attention``.

    Raises:
        UnsupportedModelError: it does not; the message names those that it has.
    """
    supported = list_attention_implementations(model_config, config, model_path)
    if model_config.attention == "auto" or not supported or model_config.attention in supported:
        return
    raise UnsupportedModelError(
        f"{config.model_type} does not support model.attention={model_config.attention}; set model.attention to "
        f"{' or '.join(supported)}, or to auto"
    )


def list_attention_implementations(
    model_config: Model, config: PreTrainedConfig, model_path: str
) -> list[AttentionImplementation]:
    """Return the implementations that the architecture supports, fastest first; empty if it has no causal LM."""
    model_class = _find_model_class(model_config, config, model_path)
    if model_class is None:
        return []
    names: list[AttentionImplementation] = ["flash_attention_2"] if model_class._supports_flash_attn else []
    return [*names, "sdpa", "eager"] if model_class._supports_sdpa else [*names, "eager"]


def _find_model_class(model_config: Model, config: PreTrainedConfig, model_path: str) -> type[PreTrainedModel] | None:
    """Return the class that transformers loads for ``config`` as a causal language model, None if it has none."""
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote_code = getattr(config, "auto_map", None) or {}
    if model_config.trust_remote_code and "AutoModelForCausalLM" in remote_code:
        try:
            remote: type[PreTrainedModel] = get_class_from_dynamic_module(
                remote_code["AutoModelForCausalLM"], model_path, revision=model_config.revision
            )
        except (ImportError, OSError, AttributeError) as error:
            raise UnsupportedModelError(f"the code in {model_path} cannot be loaded: {first_line(error)}") from error
        return remote
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return model_class[0] if isinstance(model_class, tuple) else model_class
