"""Expand a suite file into its runs: every recipe with every combination of axis values."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError

from peftbench.common.schema import ConfigSection
from peftbench.common.text import expand_home
from peftbench.common.validation_errors import OUT_OF_RANGE_ERRORS, describe_requirement
from peftbench.errors import (
    MissingFileError,
    OutOfRangeError,
    RecipeError,
    UnknownKeyError,
    WrongTypeError,
    did_you_mean,
)
from peftbench.evaluation.metrics.selection import check_metrics
from peftbench.recipe.loader import merge_configs, parse_recipe, read_layers, to_inline_yaml, to_plain_dict
from peftbench.recipe.scalars import restore_text
from peftbench.recipe.schema import Recipe

SEED_KEY = "train.seed"
"""The key that --seeds varies: initial weights, batch order and dropout; the examples stay the same."""


class Suite(ConfigSection):
    """The keys of a suite file."""

    name: str
    """Name of the suite."""
    recipes: tuple[str, ...] = Field(min_length=1)
    """Recipe files, relative to the suite file."""
    overrides: tuple[str, ...] = ()
    """Overrides KEY.SUB=VALUE for every recipe."""
    axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default={})
    """Keys to vary, e.g. {train.seed: [0, 1, 2]}; every recipe runs with every combination."""
    slurm: dict[str, str | int | float | bool | tuple[str, ...] | None] = Field(default={})
    """Options of sbatch for peftbench submit, e.g. {partition: gpu, prologue: [module load cuda]}."""
    accelerate: str | None = None
    """Accelerate config file, relative to the suite file; null runs one process without a launcher."""
    _written_axes: dict[str, Any] = PrivateAttr(default_factory=dict)

    def with_written_axes(self, written: Mapping[str, Any]) -> Suite:
        """Return a copy that knows how the values of ``axes`` were written."""
        suite = self.model_copy()
        suite._written_axes = dict(written)
        return suite

    def iter_grid_points(self) -> Iterator[tuple[tuple[str, Any, str], ...]]:
        """Yield every combination of axis values: key, value for the name, and text of the override."""
        axes = []
        for key, values in self.axes.items():
            written = self._written_axes.get(key)
            texts = written if isinstance(written, list) and len(written) == len(values) else [None] * len(values)
            axes.append([_build_axis_value(key, *pair) for pair in zip(values, texts, strict=True)])
        yield from itertools.product(*axes)


def read_suite(path: Path) -> Suite:
    """Return the suite in a file.

    Raises:
        RecipeError: the file is not a valid suite.
    """
    values: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for layer in read_layers(path):
        values |= to_plain_dict(layer.config)
        written |= to_plain_dict(layer.written)
    restore_text(values, written, Suite, {})
    if isinstance(values.get("slurm"), dict):
        values["slurm"] = {key: _get_text(value, written["slurm"].get(key)) for key, value in values["slurm"].items()}
    try:
        suite = Suite.model_validate_json(json.dumps(values, default=str), strict=True)
        return suite.with_written_axes(written.get("axes") or {})
    except ValidationError as error:
        # A misspelt key also makes a required key missing, so the unknown key is reported first.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, Suite.model_fields)
            raise UnknownKeyError(f"{path} is not a valid suite: unknown key {key!r}", hint) from error
        if first["type"] == "missing":
            raise RecipeError(f"{path} is not a valid suite: {key} is missing", "set it") from error
        kind = OutOfRangeError if first["type"].startswith(OUT_OF_RANGE_ERRORS) else WrongTypeError
        raise kind(f"{path} is not a valid suite: {key} must be {describe_requirement(first)}") from error


def expand(
    path: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    seeds: int | None = None,
    config: Sequence[Path] = (),
) -> list[Recipe]:
    """Return the recipes of all runs of the suite in ``path``, each with a unique name; ``seeds`` repeats them.

    The files of ``config`` and then ``overrides`` are merged into every recipe.

    Raises:
        RecipeError: a recipe is invalid, two runs have the same name, both an axis and ``seeds`` vary the seed, or
            early stopping could make the runs differ in steps.
    """
    suite = read_suite(path)
    if seeds is not None and SEED_KEY in suite.axes:
        raise OutOfRangeError(
            f"{path} already has an axis {SEED_KEY}", "leave --seeds out, or remove that axis from the suite"
        )
    recipes: list[Recipe] = []
    for name in suite.recipes:
        file = path.parent / expand_home(name)
        for point in suite.iter_grid_points():
            changes = [f"{key}={text}" for key, _, text in point]
            output = [f"output_dir={to_inline_yaml(str(out))}"] if out is not None else []
            values = merge_configs([file], [*suite.overrides, *changes], config, [*overrides, *output])
            values["name"] = "-".join(
                [str(values.get("name", file.stem)), *(_format_axis_label(key, value) for key, value, _ in point)]
            )
            recipe = parse_recipe(values)
            check_metrics(recipe)
            recipes += with_seeds(recipe, seeds)
    names = [recipe.name for recipe in recipes]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"several runs of {path} are named {', '.join(duplicates)}; give each recipe a unique name")
    check_equal_steps(recipes)
    return recipes


def check_equal_steps(recipes: Sequence[Recipe]) -> None:
    """Check that early stopping cannot make the runs of a comparison train for different numbers of steps.

    Raises:
        OutOfRangeError: it can, and the recipe does not allow that.
    """
    trained = [recipe for recipe in recipes if recipe.method.is_trainable]
    for recipe in trained if len(trained) > 1 else ():
        stopping = recipe.early_stopping
        if stopping.patience is not None and not stopping.allow_unequal_steps:
            raise OutOfRangeError(
                f"early_stopping.patience={stopping.patience} of {recipe.name} can end the {len(trained)} trainings "
                "of this comparison after different numbers of steps",
                "set early_stopping.patience=null, or early_stopping.allow_unequal_steps=true",
            )


def with_seeds(recipe: Recipe, seeds: int | None) -> list[Recipe]:
    """Return ``recipe`` repeated with ``seeds`` consecutive seeds from its train.seed, named like runs of a seed axis.

    Returns the recipe unchanged if ``seeds`` is None, or if the method trains nothing and no seed changes the run.

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
    """Return the accelerate config file that the suite in ``path`` names, None if it names none.

    Raises:
        MissingFileError: the file does not exist.
    """
    name = read_suite(path).accelerate
    if name is None:
        return None
    file = path.parent / expand_home(name)
    if not file.is_file():
        raise MissingFileError(f"{path} names the accelerate config {name}, but {file} does not exist")
    return file


def _build_axis_value(key: str, value: object, written: object) -> tuple[str, object, str]:
    text = _get_text(value, written)
    if text is value:
        return key, value, json.dumps(value)
    return key, text if isinstance(value, bool) else value, str(text)


def _get_text(value: object, written: object) -> object:
    """Return a number or a boolean such as ``off`` as written; true, false, null and text are returned unchanged."""
    is_constant = value is None or (isinstance(value, bool) and str(written).lower() in {"true", "false"})
    return value if is_constant or isinstance(value, (str, list, dict)) or not isinstance(written, str) else written


def _format_axis_label(key: str, value: object) -> str:
    """Return e.g. ``seed=1`` for the axis ``train.seed``; characters unfit for a folder name become underscores."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{key.rsplit('.', 1)[-1]}=" + "".join(c if c.isalnum() or c in "._+-" else "_" for c in text)
