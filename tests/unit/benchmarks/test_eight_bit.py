"""The 8-bit benchmark's table, records and recipes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peftbench.record import read_records
from peftbench.suite.expand import expand
from tests.helpers.paths import REPOSITORY
from tests.unit.report.test_shipped_results import find_changed_keys

FOLDER = REPOSITORY / "benchmarks" / "eight_bit"


def test_readme_table_matches_records() -> None:
    """The README has the lines that table.py prints."""
    expected = subprocess.run(
        [sys.executable, str(FOLDER / "table.py"), str(FOLDER / "records")], capture_output=True, text=True, check=True
    ).stdout
    table = (FOLDER / "README.md").read_text(encoding="utf-8").split("<!-- table -->\n")[1].split("<!-- end")[0]
    assert table == expected


def test_records_match_recipes() -> None:
    """Every key is equal except the paths of data and model."""
    records = {record.name: record for record in read_records(FOLDER / "records")}
    recipes = {recipe.name: recipe for recipe in expand(FOLDER / "suite.yaml", [], None)}
    assert set(records) == set(recipes) == {"adamw", "adamw8bit", "all_in_8bit"}
    for name, recipe in recipes.items():
        recorded, expected = records[name].recipe, recipe.model_dump(mode="json")
        assert recorded["model"].pop("path") != expected["model"].pop("path")
        for split in ("train", "test"):
            recorded["data"]["source"][split] = expected["data"]["source"][split]
        assert find_changed_keys(recorded, expected) == []


def test_8bit_states_are_smaller_at_equal_losses() -> None:
    """All-8-bit states need a quarter of the bytes, which equal the closed form, and 20 losses agree within 0.1 %."""
    records = {record.name: record for record in read_records(FOLDER / "records")}
    states = {name: record.state_bytes for name, record in records.items()}
    assert all(size is not None and size.optimizer == size.expected_optimizer for size in states.values())
    sizes = {name: size.optimizer for name, size in states.items() if size is not None}
    assert sizes["adamw"] / sizes["all_in_8bit"] == pytest.approx(4, rel=0.02)
    assert records["all_in_8bit"].step_losses == pytest.approx(records["adamw"].step_losses, rel=1e-3)
    assert len(records["adamw"].step_losses) == 20
