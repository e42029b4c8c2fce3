"""The 8-bit benchmark's table is that of its records, and its recipes can be read."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peftbench.record import read_records
from peftbench.suite.expand import expand
from tests.helpers.paths import REPOSITORY
from tests.unit.report.test_shipped_results import unlike

FOLDER = REPOSITORY / "benchmarks" / "eight_bit"


def test_the_readme_shows_the_records() -> None:
    """Line by line what table.py prints."""
    printed = subprocess.run(
        [sys.executable, str(FOLDER / "table.py"), str(FOLDER / "records")], capture_output=True, text=True, check=True
    ).stdout
    shown = (FOLDER / "README.md").read_text(encoding="utf-8").split("<!-- table -->\n")[1].split("<!-- end")[0]
    assert shown == printed


def test_the_records_are_of_the_recipes() -> None:
    """Every knob, but for the places of the data and of the model."""
    records = {record.name: record for record in read_records(FOLDER / "records")}
    recipes = {recipe.name: recipe for recipe in expand(FOLDER / "suite.yaml", [], None)}
    assert set(records) == set(recipes) == {"adamw", "adamw8bit", "all_in_8bit"}
    for name, recipe in recipes.items():
        kept, asked = records[name].recipe, recipe.model_dump(mode="json")
        assert kept["model"].pop("path") != asked["model"].pop("path")
        for split in ("train", "test"):
            kept["data"]["source"][split] = asked["data"]["source"][split]
        assert unlike(kept, asked) == []


def test_states_are_smaller_and_losses_are_not_others() -> None:
    """About four times where all are in 8 bits; bytes as the closed form says; 20 losses within a thousandth."""
    records = {record.name: record for record in read_records(FOLDER / "records")}
    states = {name: record.state_bytes for name, record in records.items()}
    assert all(found is not None and found.optimizer == found.expected_optimizer for found in states.values())
    sizes = {name: found.optimizer for name, found in states.items() if found is not None}
    assert sizes["adamw"] / sizes["all_in_8bit"] == pytest.approx(4, rel=0.02)
    assert records["all_in_8bit"].step_losses == pytest.approx(records["adamw"].step_losses, rel=1e-3)
    assert len(records["adamw"].step_losses) == 20
