"""Command-line arguments that name a recipe: ``[RECIPE.yaml] [--config FILE]... [KEY.SUB=VALUE]...``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from peftbench.errors import RecipeError
from peftbench.recipe.loader import load_recipe, read_yaml, to_plain_dict
from peftbench.recipe.schema import Recipe

SUITE_KEY = "recipes"
"""The key that every suite file has and no recipe has."""
_FILE_SUFFIXES = (".yaml", ".yml", ".json")
_RECIPE_KEYS = frozenset(Recipe.model_fields) - {"name"}


def load_recipe_from_arguments(command: str, arguments: Sequence[str], config: Sequence[Path]) -> Recipe:
    """Return the recipe that a command's arguments describe.

    The first of ``arguments`` may be a recipe file; files of ``--config`` are merged into it; overrides come last.
    ``command`` is named in errors.

    Raises:
        RecipeError: a file is a suite, an argument is neither a file nor an override, or the recipe is invalid.
    """
    files, overrides = split_arguments(arguments)
    for file in files:
        if file.suffix not in _FILE_SUFFIXES and not os.path.exists(file):  # noqa: PTH110 — no error for a long name
            raise RecipeError(
                f"{str(file)!r} is neither a recipe file nor an override; write key.sub=value, e.g. train.steps=100"
            )
    if len(files) > 1:
        raise RecipeError(
            f"peftbench {command} takes one recipe file, and {files[1]} is a second one", "merge files with --config"
        )
    paths = [*files, *config]
    for path in paths:
        check_is_recipe(path, command)
    return load_recipe(paths, overrides)


def refuse_second_file(command: str, arguments: Sequence[str]) -> None:
    """Check that no argument after the first is a file.

    Raises:
        RecipeError: one is.
    """
    files, _ = split_arguments(arguments)
    if existing := [file for file in files if os.path.exists(file)]:  # noqa: PTH110
        raise RecipeError(
            f"peftbench {command} takes one file, and {existing[0]} is a second one", "merge files with --config"
        )


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the files and the overrides.

    An argument with "=" is a file if that file exists: run folders of a suite with axes have "=" in their names.
    """
    files = [argument for argument in arguments if "=" not in argument or os.path.isfile(argument)]  # noqa: PTH113
    return [Path(file) for file in files], [argument for argument in arguments if argument not in files]


def is_suite(path: Path) -> bool:
    """True if the file is a suite rather than a recipe.

    Raises:
        RecipeError: the file cannot be read.
    """
    return any(SUITE_KEY in part for part in read_yaml(path))


def check_is_recipe(path: Path, command: str) -> None:
    """Refuse a suite.

    Raises:
        RecipeError: it is a suite, or cannot be read.
    """
    if not is_suite(path):
        return
    hints = {
        "train": f"use peftbench run {path}",
        "estimate": f"use peftbench estimate --suite {path}",
    }
    recipes = to_plain_dict(next(part for part in read_yaml(path) if SUITE_KEY in part))[SUITE_KEY]
    names = [str(path.parent / name) for name in recipes if isinstance(name, str)] if isinstance(recipes, list) else []
    hint = f"give one of its recipes: {', '.join(names)}" if names else f"{SUITE_KEY} must be a list of recipe files"
    raise RecipeError(f"{path} is a suite, and peftbench {command} takes a recipe", hints.get(command, hint))


def check_is_suite(path: Path, command: str) -> None:
    """Refuse a recipe.

    Raises:
        RecipeError: it is a recipe, or cannot be read.
    """
    keys = {str(key) for part in read_yaml(path) for key in part}
    if SUITE_KEY not in keys and keys & _RECIPE_KEYS:
        hint = f"use peftbench estimate {path}" if command.startswith("estimate") else f"use peftbench train {path}"
        raise RecipeError(f"{path} is a recipe, and peftbench {command} takes a suite", hint)
