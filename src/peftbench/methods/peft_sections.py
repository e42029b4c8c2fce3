"""Recipe sections of peft's types: the keys of ``method`` are the fields of peft's config class.

A section is built when a recipe names its type, since importing peft takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Optional, Union, get_args, get_origin

from pydantic import Field, create_model, model_validator

from peftbench.common.schema import ConfigSection

SET_BY_PEFTBENCH = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "fan_in_fan_out",
        "token_dim",
        "num_transformer_submodules",
        "num_attention_heads",
        "num_layers",
        "tokenizer_name_or_path",
        "total_step",
        "progressbar",
        "megatron_config",
        "megatron_core",
    }
)
"""Fields of peft's configs that peftbench sets from the base model, the recipe or the run."""
INIT_CLASSES = {"eva_config": "EvaConfig", "corda_config": "CordaConfig", "lora_ga_config": "LoraGAConfig"}
"""Keys of LoRA's config for the initializations that read training examples, and the config class of each."""
_HIDDEN_OPTIONS = frozenset({"cache_file", "covariance_file", "verbose", "prune_temporary_fields", "label_mask_value"})
"""Options of LoRA's initializations that have no meaning in a run, or name pickled files."""
_DEFAULT_VIRTUAL_TOKENS = 20
_REPLACED_DEFAULTS: Mapping[str, object] = {"num_virtual_tokens": _DEFAULT_VIRTUAL_TOKENS}
"""Defaults of fields that have none in peft."""


class InitSection(ConfigSection):
    """Options of an initialization of LoRA that reads training examples."""

    init_examples: int = Field(default=256, gt=0)
    """Number of training examples to read, in the order of training; all if there are fewer."""


@functools.cache
def build_init_section(key: str) -> type[InitSection]:
    """Return the section of ``method.KEY``: the options of peft's config class of an initialization."""
    from peft.tuners.lora import config

    config_class: type[Any] = getattr(config, INIT_CLASSES[key])
    hints = typing.get_type_hints(config_class)
    keys: dict[str, Any] = {
        field.name: (hints[field.name], _build_default(field))
        for field in dataclasses.fields(config_class)
        if field.name not in _HIDDEN_OPTIONS
    }

    def check(section: InitSection) -> InitSection:
        config_class(**section.model_dump(exclude={"init_examples"}))  # raises ValueError for a value out of range
        return section

    validators: dict[str, Any] = {"check_options": model_validator(mode="after")(check)}
    name = f"{config_class.__name__}Section"
    return create_model(name, __base__=InitSection, __module__=__name__, __validators__=validators, **keys)


@functools.cache
def build_fields(peft_type: str) -> dict[str, Any]:
    """Return the recipe's keys of a type, as arguments of pydantic's ``create_model``: annotation and default."""
    from peftbench.common.libraries import quiet_libraries

    quiet_libraries()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]  # type: ignore[index] # PeftType is a str
    hints = typing.get_type_hints(config_class)
    fields = [field for field in dataclasses.fields(config_class) if field.init and field.name not in SET_BY_PEFTBENCH]
    keys: dict[str, Any] = {}
    for field in fields:
        if field.name in INIT_CLASSES:
            keys[field.name] = (Optional[build_init_section(field.name)], _build_default(field))
            continue
        annotation, default = _to_recipe_type(hints[field.name]), _build_default(field)
        # Some classes have the default None for a field whose annotation does not allow it.
        keys[field.name] = (Optional[annotation] if default.default is None else annotation, default)
    return keys


def _build_default(field: dataclasses.Field[Any]) -> Any:
    description = " ".join(str(field.metadata.get("help", "")).split()) or f"The field {field.name} of peft."
    if field.name in _REPLACED_DEFAULTS:
        return Field(default=_REPLACED_DEFAULTS[field.name], description=description)
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        factory = tuple if isinstance(made, list) else field.default_factory  # lists of recipes are tuples
        return Field(default_factory=factory, description=description)
    default = None if field.default is dataclasses.MISSING else field.default
    return Field(default=default, description=description)


def _to_recipe_type(hint: Any) -> Any:
    """Return an annotation with tuples for lists, as in all recipes, and str for a Literal that has a placeholder."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return str if any("[" in str(argument) for argument in arguments) else hint
    if origin is list:
        return tuple[_to_recipe_type(arguments[0]), ...]  # type: ignore[misc]
    if origin in {Union, types.UnionType}:
        return Union[tuple(_to_recipe_type(argument) for argument in arguments)]
    return dict[str, Any] if hint is dict else hint
