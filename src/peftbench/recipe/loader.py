"""Recipes as files: read, merged, validated, and shown with every knob's meaning.

OmegaConf merges YAML files and ``key.sub=value`` overrides, pydantic validates; here is only what turns their findings
into one sentence, and ``extends``, by which a file names the files it builds on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from peftbench.common.schema import ConfigSection
from peftbench.common.text import escape_interpolation
from peftbench.data.sources import SOURCES
from peftbench.errors import (
    MissingFileError,
    OutOfRangeError,
    RecipeError,
    UnknownKeyError,
    WrongTypeError,
    did_you_mean,
)
from peftbench.methods import METHOD_KINDS
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Recipe

EXTENDS_KEY = "extends"
_KIND_REGISTRIES: dict[str, Mapping[str, type[ConfigSection]]] = {
    "method": METHOD_KINDS,
    "source": SOURCES,
    "optimizer": OPTIMIZERS,
}
_TYPE_DESCRIPTIONS = {"a valid array": "a list", "an object": "a group of knobs", "a valid tuple": "a list"}
_OUT_OF_RANGE_ERRORS = (
    "greater_than",
    "less_than",
    "too_short",
    "overlong",
    "finite_number",
    "value_error",
    "literal_error",
)


def load_recipe(files: Sequence[Path], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of ``files`` and ``overrides``, merged from left to right.

    Raises:
        MissingFileError: a file is not there.
        RecipeError: what they say together is no recipe; its subclasses say why.
    """
    if not files and not overrides:
        raise RecipeError("no recipe was given", "use --config with a YAML file, as in --config recipes/demo/lora.yaml")
    return parse_recipe(merge_configs(files, overrides))


def merge_configs(files: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """``files`` and ``overrides`` merged from left to right, not yet validated."""
    result = OmegaConf.create({})
    for part in [*(part for path in files for part in read_yaml(path)), _parse_overrides(overrides)]:
        _drop_fields_of_other_kinds(result, part)
        result = OmegaConf.merge(result, part)  # type: ignore[assignment]
    return to_plain_dict(result)


def _drop_fields_of_other_kinds(base: DictConfig, override: DictConfig) -> None:
    """Where ``later`` changes a group's kind, drop from ``earlier`` the knobs that the new kind does not have."""
    for place, table in (("method", METHOD_KINDS), ("data.source", SOURCES), ("optimizer", OPTIMIZERS)):
        group, new = OmegaConf.select(base, place), OmegaConf.select(override, f"{place}.kind")
        known = isinstance(new, str) and new in table
        if known and isinstance(group, DictConfig) and group.get("kind") not in (None, new):
            for key in [key for key in group if key not in table[new].model_fields]:
                del group[key]


def read_yaml(path: Path, visited: tuple[Path, ...] = ()) -> Iterator[DictConfig]:
    """A YAML file, after the files that its ``extends`` names (relative to itself)."""
    if path.resolve() in visited:
        raise RecipeError(f"{path} extends itself, by way of {' and '.join(str(p) for p in visited)}")
    try:
        loaded = _read_recipe_from_record(path) or OmegaConf.load(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        there = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, sorted(there)) if there else "give the path of a YAML file"
        raise MissingFileError(f"there is no file {path}", hint) from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} is not valid YAML: {_to_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise RecipeError(f"{path} must hold keys and values at its top, not a list")
    parents = loaded.pop(EXTENDS_KEY, [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, (list, ListConfig)) or not all(isinstance(parent, str) for parent in parents):
        raise WrongTypeError(f"extends in {path} must be the path of a file or a list of them")
    for parent in parents:
        yield from read_yaml(path.parent / parent, (*visited, path.resolve()))
    yield loaded


def _read_recipe_from_record(path: Path) -> DictConfig | None:
    """The recipe of a run's record, by which it can be repeated; None where the file is none."""
    if path.suffix != ".json":
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # YAML's to judge
        return None
    is_record = isinstance(values, dict) and "recipe_fingerprint" in values and isinstance(values.get("recipe"), dict)
    if not is_record:
        return None
    return OmegaConf.create({key: _escape_interpolations(value) for key, value in values["recipe"].items()})


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise RecipeError(f"{override!r} is no override; write key.sub=value, as in train.steps=100")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"cannot read the overrides {' '.join(overrides)}: {_to_one_line(error)}") from error


def to_plain_dict(config: object) -> dict[str, Any]:
    """Keys and values of an OmegaConf container, interpolations resolved."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise RecipeError(f"the recipe cannot be resolved: {_to_one_line(error)}") from error


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, strictly: no text for a number, no number for a switch.

    Raises:
        UnknownKeyError, WrongTypeError, OutOfRangeError, RecipeError: the first thing that is wrong, in one sentence.
    """
    try:
        # By way of JSON, where strict means: the types of YAML, and lists for tuples.
        return Recipe.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        # An unknown key explains what is missing beside it; so it goes first.
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        _raise_recipe_error(dict(found[0]), Recipe)
    except TypeError as error:  # a YAML date, say
        raise WrongTypeError(
            f"the recipe holds a value that is neither text, number, switch nor list: {error}"
        ) from error


def _raise_recipe_error(error: dict[str, Any], root: type[ConfigSection]) -> NoReturn:
    kind, message = str(error["type"]), str(error["msg"])
    path, fields, table = _locate_error(error["loc"], root)
    given = error.get("input")
    if kind == "extra_forbidden":
        raise UnknownKeyError(f"there is no knob {path!r}", did_you_mean(str(error["loc"][-1]), fields))
    if kind == "union_tag_invalid":
        tag = str(error["ctx"]["tag"])
        raise UnknownKeyError(f"there is no {path} of kind {tag!r}", did_you_mean(tag, table))
    if kind == "union_tag_not_found" and not isinstance(given, dict):
        raise WrongTypeError(f"{path}={given!r} has the wrong type; it must be a group of knobs")
    if kind == "union_tag_not_found":
        raise RecipeError(f"{path}.kind is missing", f"allowed: {', '.join(table)}")
    if kind == "missing":
        raise RecipeError(f"{path} is missing; a recipe must say it")
    if kind == "literal_error" and isinstance(given, str):
        names = [name.strip(" '") for name in str(error["ctx"]["expected"]).replace(" or ", ", ").split(",")]
        raise OutOfRangeError(f"{path}={given!r} is not one of its values", did_you_mean(given, names))
    reason = message.removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("Input ")
    reason = _TYPE_DESCRIPTIONS.get(reason, reason)
    if kind.startswith(_OUT_OF_RANGE_ERRORS):
        shown = "" if isinstance(given, dict) else f"={given!r}"
        raise OutOfRangeError(
            f"{path}{shown}: {reason}" if kind == "value_error" else f"{path}{shown} must be {reason}"
        )
    raise WrongTypeError(f"{path}={given!r} has the wrong type; it must be {reason}")


def _locate_error(location: Sequence[str | int], root: type[ConfigSection]) -> tuple[str, list[str], list[str]]:
    """Where an error is: its dotted path, the knobs of the group it lies in, and the kinds that group may have."""
    group: type[ConfigSection] | None = root
    path: list[str] = []
    fields: list[str] = list(root.model_fields)
    table: Mapping[str, type[ConfigSection]] = {}
    for key in location:
        if isinstance(key, str) and key in table and path and path[-1] in _KIND_REGISTRIES and group is None:
            group = table[key]  # the discriminator's value, which is not part of the path
            fields = list(group.model_fields)
            continue
        if group is None and path and isinstance(key, str) and key not in fields:
            continue  # a branch of a union, as "tuple[str, ...]"
        path.append(str(key))
        table = _KIND_REGISTRIES.get(str(key), {})
        if group is not None and str(key) in group.model_fields:
            fields = list(group.model_fields)
            annotation = group.model_fields[str(key)].annotation
            group = annotation if isinstance(annotation, type) and issubclass(annotation, ConfigSection) else None
            fields = list(group.model_fields) if group is not None and key != location[-1] else fields
    return ".".join(path) or "the recipe", fields, list(table)


def to_commented_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, each knob with its one-line meaning; reads back as the same recipe."""
    return "\n".join(_iter_commented_lines(recipe, 0)) + "\n"


def _iter_commented_lines(section: ConfigSection, depth: int) -> Iterator[str]:
    margin = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        meaning = " ".join((field.description or "").split())
        if isinstance(value, ConfigSection):
            yield f"{margin}{name}:  # {meaning}"
            yield from _iter_commented_lines(value, depth + 1)
        else:
            yield f"{margin}{name}: {to_inline_yaml(list(value) if isinstance(value, tuple) else value)}  # {meaning}"


def to_inline_yaml(value: object) -> str:
    """``value`` on one line of YAML that OmegaConf reads back as it is, ``${`` and all."""
    text = yaml.safe_dump(_escape_interpolations(value), default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    # Line breaks, and texts like 1e3, which OmegaConf alone takes for numbers, need JSON's quotes.
    if "\n" in text or OmegaConf.to_container(OmegaConf.create(f"x: {text}"), resolve=True) != {"x": value}:
        text = json.dumps(_escape_interpolations(value), ensure_ascii=False)
    return text


def _escape_interpolations(value: object) -> object:
    """``value`` with OmegaConf's interpolations escaped."""
    if isinstance(value, list):
        return [_escape_interpolations(item) for item in value]
    if isinstance(value, dict):
        return {key: _escape_interpolations(item) for key, item in value.items()}
    return escape_interpolation(value) if isinstance(value, str) else value


def _to_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
