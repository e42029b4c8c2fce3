"""The recipes in recipes/."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from peftbench.recipe.loader import load_recipe, to_commented_yaml
from tests.helpers.recipe_files import write

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def find_shipped_recipes() -> list[Path]:
    """Return the recipe files of runs, without common parents and suites."""
    return [
        path
        for path in sorted(RECIPES.rglob("*.yaml"))
        if path.name != "common.yaml" and "recipes" not in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


SHIPPED = find_shipped_recipes()


def test_every_method_has_a_shipped_recipe() -> None:
    """recipes/ has at least six runs, and each method is used."""
    assert len(SHIPPED) >= 6
    kinds = {load_recipe([path]).method.kind for path in SHIPPED}
    assert kinds >= {"full", "last_layer", "lora", "prompt_tuning", "lead", "zero_shot"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_shipped_recipe_is_valid(path: Path, tmp_path: Path) -> None:
    """Every recipe file is valid, and its commented YAML reads back as the same recipe."""
    recipe = load_recipe([path])
    again = load_recipe([write(tmp_path / "again.yaml", to_commented_yaml(recipe))])
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
