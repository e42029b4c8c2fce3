"""Faults of a model's config: values from which transformers cannot build the model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peftbench.errors import ModelNotFoundError, PeftbenchError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
"""Keys of every architecture, by transformers' common names, that must be at least 1."""
_MAX_LENGTH = 300


def build_config_error(path: str, fault: str) -> ModelNotFoundError:
    """Return the error for a model whose config has a fault."""
    return ModelNotFoundError(
        f"transformers cannot use the config of {path}: {fault}", "correct its config.json, or set another model.path"
    )


def find_size_fault(config: PreTrainedConfig) -> str | None:
    """Return which size in a config is below 1, or which numbers of heads contradict each other; None if none is."""
    values = {name: _get_value(config, name) for name in _SIZES}
    for name, value in values.items():
        if isinstance(value, int) and value < 1:
            return f"{config.attribute_map.get(name, name)}={value} must be at least 1"
    heads, key_value_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(key_value_heads, int) and heads % key_value_heads:
        return f"num_attention_heads={heads} is not a multiple of num_key_value_heads={key_value_heads}"
    return None


@contextmanager
def config_faults(path: str, config: PreTrainedConfig, *, trust_remote_code: bool) -> Iterator[None]:
    """Raise an error while a model is built as one sentence if its config is at fault, unchanged otherwise.

    The config is at fault if the model cannot be built on the meta device either, which needs no memory.

    Raises:
        ModelNotFoundError: the config is at fault.
        UnsupportedModelError: it is the config of another kind of model.
    """
    try:
        yield
    except PeftbenchError:
        raise
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"{config.model_type} is not a causal language model; set model.path to one that is"
            ) from error
        fault = _find_build_fault(config, trust_remote_code=trust_remote_code)
        if fault is None:
            raise
        raise build_config_error(path, fault) from error


def describe_fault(error: Exception, values: dict[str, Any]) -> str:
    """Return transformers' error about a config with these ``values`` as a clause."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or "has model type" in str(error):  # the second is transformers' for unknown types
        return _describe_model_type(kind)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0]
    if text.startswith(("Validation error for", "Class validation error")) and len(lines) > 1:
        text = lines[1].partition(": ")[2] or lines[1]  # the first line names the validator, the second the error
    elif isinstance(error, KeyError) and error.args:
        key = _find_key(values, error.args[0])
        text = f"{key}={error.args[0]!r} is not a known value" if key else str(error.args[0])
    elif isinstance(error, ZeroDivisionError) and (zeros := [key for key in _SIZES if values.get(key) == 0]):
        text = f"{zeros[0]}=0 must be at least 1"
    elif negative := re.search(r"negative dimension (-\d+)", text):
        key = _find_key(values, int(negative.group(1)))
        text = f"{key}={negative.group(1)} must be at least 1" if key else text
    elif not isinstance(error, (ValueError, RuntimeError)):
        text = f"{type(error).__name__}: {text}"
    return text[:_MAX_LENGTH].rstrip(".")


def _describe_model_type(kind: object) -> str:
    from transformers import __version__

    if kind is None:
        return "it has no model_type, e.g. llama"
    return f"model_type={kind!r} is not an architecture of transformers {__version__}"


def _find_build_fault(config: PreTrainedConfig, *, trust_remote_code: bool) -> str | None:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
    except (ImportError, OSError):  # a library or a file, not a value
        return None
    except Exception as error:  # any value may be wrong, in any architecture
        return describe_fault(error, config.to_dict())
    return None


def _get_value(config: PreTrainedConfig, name: str) -> object:
    """Return a value of a config by its common name. Reading an attribute fails if it differs between layers."""
    return vars(config).get(config.attribute_map.get(name, name))


def _find_key(values: dict[str, Any], wrong: object) -> str | None:
    """Return the key of the value ``wrong``, also in nested sections; None if there is none."""
    for key, value in values.items():
        if isinstance(value, (str, int)) and type(value) is type(wrong) and value == wrong:
            return key
        if isinstance(value, dict) and (inner := _find_key(value, wrong)):
            return f"{key}.{inner}"
    return None
