"""The keys in which two recipes differ."""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from peftbench.common.nested_keys import MISSING, list_differences
from peftbench.recipe.arguments import check_is_recipe
from peftbench.recipe.loader import load_recipe, to_inline_yaml


def describe_recipe_differences(first: Path, second: Path) -> str:
    """Return a table of the keys in which two recipe files, or the recipes of two records, differ.

    Raises:
        RecipeError: a file is not a valid recipe.
    """
    for path in (first, second):
        check_is_recipe(path, "show --diff")
    recipes = [load_recipe([path]).model_dump(mode="json") for path in (first, second)]
    rows = [(key, format_value(one), format_value(other)) for key, one, other in list_differences(*recipes)]
    if not rows:
        return f"{first} and {second} are the same recipe"
    return tabulate(rows, headers=["key", str(first), str(second)], disable_numparse=True)


def format_value(value: object) -> str:
    """Return a value as YAML spells it, and a dash for a missing key."""
    return str(value) if value is MISSING else to_inline_yaml(value)
