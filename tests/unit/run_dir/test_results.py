"""What a suite need not run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftbench.recipe.loader import parse_recipe
from peftbench.recipe.schema import Recipe
from peftbench.record import Outcome, OutcomeKind
from peftbench.run_dir.results import load_existing_result
from tests.unit.report.records import record


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe over one file."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"article": "a", "summary": "s"}) + "\n", encoding="utf-8")
    return parse_recipe(
        {
            "name": "run",
            "output_dir": str(tmp_path / "out"),
            "method": {"kind": "lora"},
            "train": {"steps": 1},
            "data": {"source": {"kind": "files", "train": str(tmp_path / "rows.jsonl")}},
        }
    )


def write(recipe: Recipe, **changes: Any) -> None:
    """A record of ``recipe``, but for what is given."""
    values = {
        "recipe_fingerprint": recipe.fingerprint(),
        "data_fingerprint": recipe.data.source.fingerprint(),
    } | changes
    record("run", "lora", 10, **values).write(Path(recipe.output_dir) / recipe.name)


def test_a_result_of_this_recipe_on_these_examples(recipe: Recipe) -> None:
    """Nothing is finished before it ran; with its record it is."""
    assert load_existing_result(recipe) is None
    write(recipe)
    assert load_existing_result(recipe) is not None


def test_other_examples_in_the_same_file(recipe: Recipe, tmp_path: Path) -> None:
    """Where the file was changed since, or is gone, the run is not finished, and will say what is wrong."""
    write(recipe)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"article": "b", "summary": "t"}) + "\n")
    assert load_existing_result(recipe) is None
    (tmp_path / "rows.jsonl").unlink()
    assert load_existing_result(recipe) is None


def test_another_recipe_of_the_name(recipe: Recipe) -> None:
    """A changed recipe is another run."""
    write(recipe, recipe_fingerprint="another")
    assert load_existing_result(recipe) is None


@pytest.mark.parametrize(
    ("kind", "final"), [("ok", True), ("oom", True), ("diverged", True), ("preempted", False), ("failed", False)]
)
def test_only_results_are_final(kind: OutcomeKind, final: bool, recipe: Recipe) -> None:
    """An out-of-memory and a divergence are results; what was interrupted or failed is tried again."""
    write(recipe, outcome=Outcome(kind=kind, step=1))
    assert (load_existing_result(recipe) is not None) == final


def test_a_record_that_cannot_be_read(recipe: Recipe) -> None:
    """What is no record is no result."""
    write(recipe)
    (Path(recipe.output_dir) / "run" / "record.json").write_text("{", encoding="utf-8")
    assert load_existing_result(recipe) is None
