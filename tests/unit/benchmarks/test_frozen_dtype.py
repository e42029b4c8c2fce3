"""The benchmark of frozen weights in 16 bits: table, records and recipes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peftbench.record import read_records
from peftbench.suite.expand import expand
from peftbench.training.auto_settings import resolve_task
from tests.helpers.paths import REPOSITORY
from tests.unit.report.test_shipped_results import find_changed_keys

FOLDER = REPOSITORY / "benchmarks" / "frozen_dtype"


def test_readme_table_matches_records() -> None:
    """The README has the lines that losses.py prints, and each pair of runs is in them."""
    expected = subprocess.run(
        [sys.executable, str(FOLDER / "losses.py"), str(FOLDER / "records")], capture_output=True, text=True, check=True
    ).stdout
    table = (FOLDER / "README.md").read_text(encoding="utf-8").split("<!-- table -->\n")[1].split("<!-- end")[0]
    assert table == expected
    assert table.count("| 3 ") == 6


@pytest.mark.parametrize("suite", ["tiny_gpt2", "smollm2"])
def test_records_match_recipes(suite: str) -> None:
    """Every key is equal, apart from auto and the folder of a model that is not shipped."""
    records = {record.name: record for record in read_records(FOLDER / "records" / suite)}
    recipes = {recipe.name: recipe for recipe in expand(FOLDER / f"{suite}.yaml", [], None)}
    assert set(records) == set(recipes)
    for name, recipe in recipes.items():
        recorded, expected = records[name].recipe, resolve_task(recipe)[0].model_dump(mode="json")
        if suite == "smollm2":
            assert recorded["model"].pop("path") != expected["model"].pop("path")
        recorded["model"]["attention"] = expected["model"]["attention"]
        assert find_changed_keys(recorded, expected) == []
        assert records[name].outcome.kind == "ok"
