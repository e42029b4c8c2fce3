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

from peftbench.data.sources import SOURCES
from peftbench.errors import (
    MissingFileError,
    OutOfRangeError,
    RecipeError,
    UnknownKeyError,
    WrongTypeError,
    nearest,
)
from peftbench.literal import literal
from peftbench.methods import KINDS
from peftbench.optim import OPTIMIZERS
from peftbench.part import Part
from peftbench.recipe import Recipe

EXTENDS = "extends"
_TABLES: dict[str, Mapping[str, type[Part]]] = {"method": KINDS, "source": SOURCES, "optimizer": OPTIMIZERS}
_OUR_WORDS = {"a valid array": "a list", "an object": "a group of knobs", "a valid tuple": "a list"}
_OUT_OF_RANGE = ("greater_than", "less_than", "too_short", "overlong", "finite_number", "value_error", "literal_error")


def load_recipe(files: Sequence[Path], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of ``files`` and ``overrides``, merged from left to right.

    Raises:
        MissingFileError: a file is not there.
        RecipeError: what they say together is no recipe; its subclasses say why.
    """
    if not files and not overrides:
        raise RecipeError("no recipe was given", "use --config with a YAML file, as in --config recipes/demo/lora.yaml")
    return validate(merged(files, overrides))


def merged(files: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """``files`` and ``overrides`` merged from left to right, not yet validated."""
    result = OmegaConf.create({})
    for part in [*(part for path in files for part in read_yaml(path)), _dotlist(overrides)]:
        _forget_other_kinds(result, part)
        result = OmegaConf.merge(result, part)  # type: ignore[assignment]
    return plain(result)


def _forget_other_kinds(earlier: DictConfig, later: DictConfig) -> None:
    """Where ``later`` changes a group's kind, drop from ``earlier`` the knobs that the new kind does not have."""
    for place, table in (("method", KINDS), ("data.source", SOURCES), ("optimizer", OPTIMIZERS)):
        group, new = OmegaConf.select(earlier, place), OmegaConf.select(later, f"{place}.kind")
        known = isinstance(new, str) and new in table
        if known and isinstance(group, DictConfig) and group.get("kind") not in (None, new):
            for key in [key for key in group if key not in table[new].model_fields]:
                del group[key]


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[DictConfig]:
    """A YAML file, after the files that its ``extends`` names (relative to itself)."""
    if path.resolve() in seen:
        raise RecipeError(f"{path} extends itself, by way of {' and '.join(str(p) for p in seen)}")
    try:
        loaded = _recorded(path) or OmegaConf.load(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        there = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, sorted(there)) if there else "give the path of a YAML file"
        raise MissingFileError(f"there is no file {path}", hint) from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise RecipeError(f"{path} must hold keys and values at its top, not a list")
    parents = loaded.pop(EXTENDS, [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, (list, ListConfig)) or not all(isinstance(parent, str) for parent in parents):
        raise WrongTypeError(f"extends in {path} must be the path of a file or a list of them")
    for parent in parents:
        yield from read_yaml(path.parent / parent, (*seen, path.resolve()))
    yield loaded


def _recorded(path: Path) -> DictConfig | None:
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
    return OmegaConf.create({key: _literal(value) for key, value in values["recipe"].items()})


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise RecipeError(f"{override!r} is no override; write key.sub=value, as in train.steps=100")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"cannot read the overrides {' '.join(overrides)}: {_one_line(error)}") from error


def plain(config: object) -> dict[str, Any]:
    """Keys and values of an OmegaConf container, interpolations resolved."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise RecipeError(f"the recipe cannot be resolved: {_one_line(error)}") from error


def validate(values: Mapping[str, Any]) -> Recipe:
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
        _explain(dict(found[0]), Recipe)
    except TypeError as error:  # a YAML date, say
        raise WrongTypeError(
            f"the recipe holds a value that is neither text, number, switch nor list: {error}"
        ) from error


def _explain(error: dict[str, Any], root: type[Part]) -> NoReturn:
    kind, message = str(error["type"]), str(error["msg"])
    path, fields, table = _place(error["loc"], root)
    given = error.get("input")
    if kind == "extra_forbidden":
        raise UnknownKeyError(f"there is no knob {path!r}", nearest(str(error["loc"][-1]), fields))
    if kind == "union_tag_invalid":
        tag = str(error["ctx"]["tag"])
        raise UnknownKeyError(f"there is no {path} of kind {tag!r}", nearest(tag, table))
    if kind == "union_tag_not_found" and not isinstance(given, dict):
        raise WrongTypeError(f"{path}={given!r} has the wrong type; it must be a group of knobs")
    if kind == "union_tag_not_found":
        raise RecipeError(f"{path}.kind is missing", f"allowed: {', '.join(table)}")
    if kind == "missing":
        raise RecipeError(f"{path} is missing; a recipe must say it")
    if kind == "literal_error" and isinstance(given, str):
        names = [name.strip(" '") for name in str(error["ctx"]["expected"]).replace(" or ", ", ").split(",")]
        raise OutOfRangeError(f"{path}={given!r} is not one of its values", nearest(given, names))
    reason = message.removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("Input ")
    reason = _OUR_WORDS.get(reason, reason)
    if kind.startswith(_OUT_OF_RANGE):
        shown = "" if isinstance(given, dict) else f"={given!r}"
        raise OutOfRangeError(
            f"{path}{shown}: {reason}" if kind == "value_error" else f"{path}{shown} must be {reason}"
        )
    raise WrongTypeError(f"{path}={given!r} has the wrong type; it must be {reason}")


def _place(location: Sequence[str | int], root: type[Part]) -> tuple[str, list[str], list[str]]:
    """Where an error is: its dotted path, the knobs of the group it lies in, and the kinds that group may have."""
    group: type[Part] | None = root
    path: list[str] = []
    fields: list[str] = list(root.model_fields)
    table: Mapping[str, type[Part]] = {}
    for key in location:
        if isinstance(key, str) and key in table and path and path[-1] in _TABLES and group is None:
            group = table[key]  # the discriminator's value, which is not part of the path
            fields = list(group.model_fields)
            continue
        if group is None and path and isinstance(key, str) and key not in fields:
            continue  # a branch of a union, as "tuple[str, ...]"
        path.append(str(key))
        table = _TABLES.get(str(key), {})
        if group is not None and str(key) in group.model_fields:
            fields = list(group.model_fields)
            annotation = group.model_fields[str(key)].annotation
            group = annotation if isinstance(annotation, type) and issubclass(annotation, Part) else None
            fields = list(group.model_fields) if group is not None and key != location[-1] else fields
    return ".".join(path) or "the recipe", fields, list(table)


def explained(recipe: Recipe) -> str:
    """The resolved recipe as YAML, each knob with its one-line meaning; reads back as the same recipe."""
    return "\n".join(_explained(recipe, 0)) + "\n"


def _explained(part: Part, depth: int) -> Iterator[str]:
    margin = "  " * depth
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        meaning = " ".join((field.description or "").split())
        if isinstance(value, Part):
            yield f"{margin}{name}:  # {meaning}"
            yield from _explained(value, depth + 1)
        else:
            yield f"{margin}{name}: {in_yaml(list(value) if isinstance(value, tuple) else value)}  # {meaning}"


def in_yaml(value: object) -> str:
    """``value`` on one line of YAML that OmegaConf reads back as it is, ``${`` and all."""
    text = yaml.safe_dump(_literal(value), default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    # Line breaks, and texts like 1e3, which OmegaConf alone takes for numbers, need JSON's quotes.
    if "\n" in text or OmegaConf.to_container(OmegaConf.create(f"x: {text}"), resolve=True) != {"x": value}:
        text = json.dumps(_literal(value), ensure_ascii=False)
    return text


def _literal(value: object) -> object:
    """``value`` with OmegaConf's interpolations escaped."""
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    return literal(value) if isinstance(value, str) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
