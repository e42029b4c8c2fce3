"""Read, merge and validate recipe files, and write a recipe as YAML with the meaning of every key.

OmegaConf merges YAML files and ``key.sub=value`` overrides; pydantic validates. This module turns their errors into one
sentence and implements ``extends``, which names the files that a recipe file builds on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from peftbench.common.fingerprint import add_neutral_keys
from peftbench.common.renamed_keys import MOVED_KEYS, RENAMED_KEYS, RENAMED_VALUES, REPLACED_SWITCHES
from peftbench.common.schema import ConfigSection, find_section_class
from peftbench.common.text import escape_interpolation, expand_home
from peftbench.common.validation_errors import OUT_OF_RANGE_ERRORS, describe_requirement
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
from peftbench.recipe.scalars import find_section, load_as_text, restore_text
from peftbench.recipe.schema import Recipe
from peftbench.record.upgrade import upgrade_recipe
from peftbench.tasks import TASK_KINDS

EXTENDS_KEY = "extends"
_KIND_REGISTRIES: dict[str, Mapping[str, type[ConfigSection]]] = {
    "method": METHOD_KINDS,
    "source": SOURCES,
    "optimizer": OPTIMIZERS,
    "task": TASK_KINDS,
}
_YAML_ERRORS = (yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, RecursionError)
"""Everything that reading YAML raises; ValueError and LookupError are those of malformed numbers and keys."""


def load_recipe(files: Sequence[Path], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of ``files`` and ``overrides``, merged from left to right.

    Raises:
        MissingFileError: a file does not exist.
        RecipeError: the merged values are not a valid recipe; its subclasses give the reason.
    """
    if not files and not overrides:
        raise RecipeError("no recipe was given", "pass a YAML file, e.g. recipes/demo/lora.yaml")
    return parse_recipe(merge_configs(files, overrides))


def merge_configs(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    later_files: Sequence[Path] = (),
    later_overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Merge the arguments from left to right, without validation."""
    layers = [
        *(layer for path in files for layer in read_layers(path)),
        _parse_overrides(overrides),
        *(layer for path in later_files for layer in read_layers(path)),
        _parse_overrides(later_overrides),
    ]
    values, written = (_merge([layer[part] for layer in layers]) for part in (0, 1))
    restore_text(values, written, Recipe, _KIND_REGISTRIES)
    return values


def _merge(configs: Iterable[DictConfig]) -> dict[str, Any]:
    merged = OmegaConf.create({})
    try:
        for config in configs:
            _drop_fields_of_other_kinds(merged, config)
            merged = OmegaConf.merge(merged, config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise RecipeError(f"the recipe cannot be merged: {_to_one_line(error)}") from error
    return to_plain_dict(merged)


def _drop_fields_of_other_kinds(base: DictConfig, override: DictConfig) -> None:
    """If ``override`` changes a group's kind, delete the keys from ``base`` that the new kind does not have."""
    for group_path, kinds in (
        ("method", METHOD_KINDS),
        ("data.source", SOURCES),
        ("optimizer", OPTIMIZERS),
        ("task", TASK_KINDS),
    ):
        group, new_group = _select_group(base, group_path), _select_group(override, group_path)
        if group is None or new_group is None or group.get("kind") is None:
            continue
        section = find_section(kinds, {**group, **new_group})
        if section is not None and section is not find_section(kinds, group):
            for key in [key for key in group if key not in section.model_fields]:
                del group[key]


class Layer(NamedTuple):
    """One file or the overrides, before merging."""

    config: DictConfig
    written: DictConfig
    """The same with every scalar as the text that was written."""


def _select_group(config: DictConfig, path: str) -> DictConfig | None:
    """Return the group of keys at a dotted path, None if there is none."""
    group: object = config
    for key in path.split("."):
        group = group.get(key) if isinstance(group, DictConfig) else None
    return group if isinstance(group, DictConfig) else None


def read_yaml(path: Path) -> Iterator[DictConfig]:
    """Yield the files that ``extends`` names, then the file itself; see :func:`read_layers`."""
    yield from (layer.config for layer in read_layers(path))


def read_layers(path: Path, visited: tuple[Path, ...] = ()) -> Iterator[Layer]:
    """Yield the files that ``extends`` names (paths relative to ``path``), then the file itself.

    Raises:
        MissingFileError: a file does not exist.
        RecipeError: a file is not valid YAML, or extends itself.
    """
    if path.resolve() in visited:
        raise RecipeError(f"{path} extends itself, through {' and '.join(str(p) for p in visited)}")
    try:
        record = _read_recipe_from_record(path)
        loaded = OmegaConf.load(path) if record is None else record
        written = record or OmegaConf.create(load_as_text(path.read_text(encoding="utf-8")) or {})
    except IsADirectoryError as error:
        raise MissingFileError(f"{path} is a folder", "pass the path of a YAML file") from error
    except FileNotFoundError as error:
        candidates = [p.name for p in path.parent.glob("[!.]*.yaml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, sorted(candidates)) if candidates else "pass the path of a YAML file"
        raise MissingFileError(f"file {str(path)!r} does not exist", hint) from error
    except OSError as error:
        raise MissingFileError(f"{path} cannot be read: {error.strerror}") from error
    except _YAML_ERRORS as error:
        raise RecipeError(f"{path} is not valid YAML: {_explain_yaml_error(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise RecipeError(f"{path} must have keys and values at its top level, not a list")
    parents = loaded.pop(EXTENDS_KEY, [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, (list, ListConfig)) or not all(isinstance(parent, str) for parent in parents):
        raise WrongTypeError(f"extends in {path} must be the path of a file or a list of paths")
    for parent in parents:
        yield from read_layers(path.parent / expand_home(parent), (*visited, path.resolve()))
    if isinstance(written, DictConfig):
        written.pop(EXTENDS_KEY, None)
        yield Layer(loaded, written)
    else:
        yield Layer(loaded, loaded)


def _read_recipe_from_record(path: Path) -> DictConfig | None:
    """Return the recipe of a run's record, so that the run can be repeated; None if the file is not a record."""
    if path.suffix != ".json":
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON; the caller reads it as YAML
        return None
    is_record = isinstance(values, dict) and "recipe_fingerprint" in values and isinstance(values.get("recipe"), dict)
    if not is_record:
        return None
    recipe = add_neutral_keys(upgrade_recipe(values["recipe"], values.get("schema_version")))
    return OmegaConf.create({key: _escape_interpolations(value) for key, value in recipe.items()})


def _parse_overrides(overrides: Sequence[str]) -> Layer:
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise RecipeError(f"{override!r} is not a valid override; write key.sub=value, e.g. train.steps=100")
    try:
        written = OmegaConf.create({})
        for override in overrides:
            key, _, value = override.partition("=")
            OmegaConf.update(written, key, load_as_text(value), force_add=True)
        return Layer(OmegaConf.from_dotlist(list(overrides)), written)
    except _YAML_ERRORS as error:
        raise RecipeError(f"cannot read the overrides {' '.join(overrides)}: {_explain_yaml_error(error)}") from error


def to_plain_dict(config: object) -> dict[str, Any]:
    """Return the keys and values of an OmegaConf container, with interpolations resolved."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise RecipeError(f"the recipe cannot be resolved: {_to_one_line(error)}") from error


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """Validate plain values strictly: no text for a number, no number for a boolean.

    Raises:
        UnknownKeyError, WrongTypeError, OutOfRangeError, RecipeError: the first error, in one sentence.
    """
    try:
        # Strict validation of JSON accepts the types of YAML, and lists for tuples.
        return Recipe.model_validate_json(json.dumps(values, default=_refuse_type), strict=True)
    except ValidationError as error:
        # A misspelt key also leaves the right key missing, so unknown keys are reported first.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        _raise_recipe_error(dict(errors[0]), Recipe, values)


def _refuse_type(value: object) -> NoReturn:
    raise WrongTypeError(
        f"Invalid recipe: {value} has type {type(value).__name__}; a value must be text, a number, true, false, null, "
        "a list or a group of keys"
    )


def _raise_recipe_error(error: dict[str, Any], root: type[ConfigSection], values: Mapping[str, Any]) -> NoReturn:
    kind, given = str(error["type"]), error.get("input")
    path, fields, kinds = _locate_error(error["loc"], root, values)
    if kind == "extra_forbidden":
        _raise_unknown_key(path, fields)
    if kind == "unexpected_keyword_argument":  # a key of a group that is a dataclass of peft
        raise UnknownKeyError(
            f"Invalid recipe: there is no key '{path}.{error['loc'][-1]}'", "see peft's documentation"
        )
    if kind == "union_tag_invalid":
        tag = str(error["ctx"]["tag"])
        raise UnknownKeyError(f"Invalid recipe: there is no {path} of kind {tag!r}", did_you_mean(tag, kinds))
    if kind == "union_tag_not_found" and not isinstance(given, dict):
        raise WrongTypeError(f"Invalid recipe: {path}={_quote(given)} has the wrong type; it must be a group of keys")
    if kind == "union_tag_not_found":
        raise RecipeError(f"Invalid recipe: {path}.kind is missing", f"allowed: {', '.join(kinds)}")
    if kind == "missing":
        raise RecipeError(f"Invalid recipe: {path} is missing; set it")
    if kind == "literal_error":
        names = [name.strip(" '") for name in str(error["ctx"]["expected"]).replace(" or ", ", ").split(",")]
        value = given if isinstance(given, str) else _quote(given)
        renamed = RENAMED_VALUES.get(path, {}).get(value.lower())
        names += ["null"] if _accepts_null(path, root) else []
        hint = f"it was renamed to {renamed!r}" if renamed else did_you_mean(value, names)
        raise OutOfRangeError(f"Invalid recipe: {path}={_quote(given)} is not an allowed value", hint)
    shown = path if isinstance(given, dict) else f"{path}={_quote(given)}"
    if kind.startswith(OUT_OF_RANGE_ERRORS):
        separator = ": " if kind == "value_error" else " must be "
        subject = f"{shown}{separator}" if error["loc"] else ""  # a message about several groups names its keys
        raise OutOfRangeError(f"Invalid recipe: {subject}{describe_requirement(error)}")
    raise WrongTypeError(f"Invalid recipe: {shown} has the wrong type; it must be {describe_requirement(error)}")


def _quote(value: object) -> str:
    """Return a value as YAML spells it: text in quotes, true, null, a list in brackets."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=repr)


def _accepts_null(path: str, root: type[ConfigSection]) -> bool:
    """True if the key at ``path`` may be null."""
    annotation: Any = root
    for name in path.split("."):
        fields = getattr(annotation, "model_fields", {})
        if name not in fields:
            return False
        annotation = fields[name].annotation
    return type(None) in get_args(annotation)


def _raise_unknown_key(path: str, fields: Sequence[str]) -> NoReturn:
    if path in REPLACED_SWITCHES:
        new, replacements = REPLACED_SWITCHES[path]
        uses = [f"{new}={_quote(value)} for {_quote(old)}" for old, value in replacements.items()]
        raise UnknownKeyError(f"Invalid recipe: there is no key {path!r}", f"use {' and '.join(uses)}")
    renamed = RENAMED_KEYS.get(path, "")
    key = path.rpartition(".")[2]
    section = path.removesuffix(key)
    hint = did_you_mean(key, fields, prefix=section)
    if renamed.rpartition(".")[2] in fields:
        hint = f"it was renamed to {renamed!r}"
    elif moved := MOVED_KEYS.get(path):
        kind = "summarization" if moved.startswith("task.") else None
        hint = f"it was renamed to {moved!r}" + (f", a key of task.kind={kind}" if kind else "")
    raise UnknownKeyError(f"Invalid recipe: there is no key {path!r}", hint)


def _locate_error(
    location: Sequence[str | int], root: type[ConfigSection], values: Mapping[str, Any]
) -> tuple[str, list[str], list[str]]:
    """Return the dotted path of an error, the keys of its group, and the kinds that the group can have."""
    group: type[ConfigSection] | None = root
    given: object = values
    path: list[str] = []
    fields: list[str] = list(root.model_fields)
    table: Mapping[str, type[ConfigSection]] = {}
    follows_group = False
    for key in location:
        is_tag, follows_group = follows_group and path[-1] != "method" and key in table, False
        if is_tag:
            continue  # the kind, which is not part of the path
        if isinstance(key, str) and (" " in key or (group is None and path and key not in fields)):
            continue  # a branch of a union, e.g. "tuple[str, ...]"
        path.append(str(key))
        given = given.get(key) if isinstance(given, Mapping) else None
        table = _KIND_REGISTRIES.get(str(key), {})
        follows_group = bool(table)
        if group is None or str(key) not in group.model_fields:
            continue
        field = group.model_fields[str(key)]
        if table:
            group = find_section(table, given, field) if isinstance(given, Mapping) else None
        else:
            group = find_section_class(field.annotation)
        fields = list(group.model_fields) if group is not None else fields
    return ".".join(path) or "the recipe", fields, list(table)


def to_commented_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, each key with its one-line meaning. It reads back as the same recipe."""
    return "\n".join(_iter_commented_lines(recipe, 0)) + "\n"


def _iter_commented_lines(section: ConfigSection, depth: int) -> Iterator[str]:
    margin = "  " * depth
    plain = section.model_dump(mode="json", warnings=False)
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        meaning = " ".join((field.description or "").split())
        if isinstance(value, ConfigSection):
            yield f"{margin}{name}:  # {meaning}"
            yield from _iter_commented_lines(value, depth + 1)
        else:
            yield f"{margin}{name}: {to_inline_yaml(plain[name])}  # {meaning}"


def to_inline_yaml(value: object) -> str:
    """Return ``value`` as one line of YAML that OmegaConf reads back unchanged, text with ``${`` included."""
    text = yaml.safe_dump(_escape_interpolations(value), default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    # Line breaks need JSON's quotes. So does text like 1e3, which OmegaConf reads as a number and YAML does not.
    if "\n" in text or OmegaConf.to_container(OmegaConf.create(f"x: {text}"), resolve=True) != {"x": value}:
        text = json.dumps(_escape_interpolations(value), ensure_ascii=False)
    return text


def _escape_interpolations(value: object) -> object:
    """Return ``value`` with OmegaConf's interpolations escaped."""
    if isinstance(value, list):
        return [_escape_interpolations(item) for item in value]
    if isinstance(value, dict):
        return {key: _escape_interpolations(item) for key, item in value.items()}
    return escape_interpolation(value) if isinstance(value, str) else value


def _explain_yaml_error(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError)):
        return _to_one_line(error)
    return "a number or a key is malformed"


def _to_one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OmegaConfBaseException):
        text = text.partition("\n")[0]  # the next lines name OmegaConf's own types
    return " ".join(text.split())[:300]
