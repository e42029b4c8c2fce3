"""From a suite file to its runs: recipes times axes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from peftbench.common.schema import ConfigSection
from peftbench.errors import MissingFileError, OutOfRangeError, RecipeError, UnknownKeyError, did_you_mean
from peftbench.recipe.loader import merge_configs, parse_recipe, read_yaml, to_inline_yaml, to_plain_dict
from peftbench.recipe.schema import Recipe

SEED_KEY = "train.seed"
"""The knob that --seeds varies: new weights, the order of batches, dropout; the examples stay the same."""


class Suite(ConfigSection):
    """A comparison: which recipes, changed how, launched by what."""

    name: str
    """Name of the suite."""
    recipes: tuple[str, ...] = Field(min_length=1)
    """Recipe files, relative to the suite's own."""
    overrides: tuple[str, ...] = ()
    """key.sub=value for every recipe."""
    axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default={})
    """Knobs to vary, as {train.seed: [0, 1, 2]}; every recipe runs with every combination."""
    slurm: dict[str, str | int | float | bool | None] = Field(default={})
    """Options of sbatch for peftbench submit, as {partition: gpu, time: "4:00:00"}."""
    accelerate: str | None = None
    """Accelerate config file, relative to the suite's own; null runs one process without a launcher."""


def read_suite(path: Path) -> Suite:
    """The suite of a file.

    Raises:
        RecipeError: it is no suite; its subclasses say why.
    """
    values: dict[str, Any] = {}
    for part in read_yaml(path):
        values |= to_plain_dict(part)
    try:
        return Suite.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        # An unknown key explains what is missing beside it; so it goes first.
        found = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(map(str, found["loc"]))
        if found["type"] == "extra_forbidden":
            hint = did_you_mean(key, Suite.model_fields)
            raise UnknownKeyError(f"{path} is no suite: there is no key {key!r}", hint) from error
        raise RecipeError(f"{path} is no suite: {key}: {found['msg']}") from error


def expand(
    path: Path, overrides: Sequence[str] = (), out: Path | None = None, seeds: int | None = None
) -> list[Recipe]:
    """Every run of the suite in ``path``, each a valid recipe with a name of its own; with so many ``seeds`` each.

    Raises:
        RecipeError: a recipe is not valid, two runs have one name, or seeds are asked for twice; nothing has run yet.
    """
    suite = read_suite(path)
    if seeds is not None and SEED_KEY in suite.axes:
        raise OutOfRangeError(
            f"{path} varies {SEED_KEY} itself", "leave --seeds out, or take that axis out of the suite"
        )
    recipes: list[Recipe] = []
    for name in suite.recipes:
        file = path.parent / name
        for point in _iter_grid_points(suite.axes):
            changes = [f"{key}={json.dumps(value)}" for key, value in point]
            place = [f"output_dir={to_inline_yaml(str(out))}"] if out is not None else []
            values = merge_configs([file], [*suite.overrides, *changes, *overrides, *place])
            values["name"] = "-".join(
                [str(values.get("name", file.stem)), *(_format_axis_label(k, v) for k, v in point)]
            )
            recipes += with_seeds(parse_recipe(values), seeds)
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"several runs of {path} are named {', '.join(twice)}; give each recipe a name of its own")
    return recipes


def with_seeds(recipe: Recipe, seeds: int | None) -> list[Recipe]:
    """``recipe`` with its own train.seed and the ones that follow it, named as an axis would name them.

    It is left as it is where ``seeds`` is None, and where the method trains nothing, so that no seed changes its run.

    Raises:
        OutOfRangeError: a seed is too large.
    """
    if seeds is None or not recipe.method.is_trainable:
        return [recipe]
    values = recipe.model_dump(mode="json")
    return [
        parse_recipe(
            values
            | {"name": f"{recipe.name}-{_format_axis_label(SEED_KEY, seed)}", "train": values["train"] | {"seed": seed}}
        )
        for seed in range(recipe.train.seed, recipe.train.seed + seeds)
    ]


def resolve_accelerate_config(path: Path) -> Path | None:
    """The accelerate config file that the suite in ``path`` names, None where it names none.

    Raises:
        MissingFileError: it is not there.
    """
    named = read_suite(path).accelerate
    if named is None:
        return None
    found = path.parent / named
    if not found.is_file():
        raise MissingFileError(f"{path} names the accelerate config {named}, and there is no {found}")
    return found


def _iter_grid_points(axes: dict[str, tuple[Any, ...]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    yield from itertools.product(*([(key, value) for value in values] for key, values in axes.items()))


def _format_axis_label(key: str, value: object) -> str:
    """``seed=1`` of the axis ``train.seed``; what a folder's name cannot hold becomes an underscore."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{key.rsplit('.', 1)[-1]}=" + "".join(c if c.isalnum() or c in "._+-" else "_" for c in text)
