"""Detection of recipes that already have a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftbench.recipe.loader import parse_recipe
from peftbench.recipe.schema import Recipe
from peftbench.record import Outcome, OutcomeKind
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.results import load_existing_result
from peftbench.run_dir.saved_model import TrainingIdentity
from tests.unit.report.records import build_record


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Return a recipe whose data file exists."""
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


def write_record(recipe: Recipe, **changes: Any) -> None:
    """Write a record of ``recipe`` with ``changes``."""
    values = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_fingerprint": recipe.fingerprint(),
        "data_fingerprint": recipe.data.source.fingerprint(),
    } | changes
    run_dir = RunDir.from_recipe(recipe)
    build_record("run", "lora", 10, **values).write(run_dir.path)
    run_dir.model_dir.mkdir(exist_ok=True)


def test_result_exists_once_the_record_is_written(recipe: Recipe) -> None:
    """Without a record there is no result."""
    assert load_existing_result(recipe) is None
    write_record(recipe)
    assert load_existing_result(recipe) is not None


def test_changed_data_invalidates_the_result(recipe: Recipe, tmp_path: Path) -> None:
    """There is no result if the data file was changed or deleted after the run."""
    write_record(recipe)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"article": "b", "summary": "t"}) + "\n")
    assert load_existing_result(recipe) is None
    (tmp_path / "rows.jsonl").unlink()
    assert load_existing_result(recipe) is None


def test_changed_recipe_invalidates_the_result(recipe: Recipe) -> None:
    """A record with another recipe fingerprint is not a result."""
    write_record(recipe, recipe_fingerprint="another")
    assert load_existing_result(recipe) is None


@pytest.mark.parametrize(
    ("kind", "final"), [("ok", True), ("oom", True), ("diverged", True), ("preempted", False), ("failed", False)]
)
def test_only_final_outcomes_are_results(kind: OutcomeKind, final: bool, recipe: Recipe) -> None:
    """An out-of-memory error and a divergence are results; an interrupted or failed run is repeated."""
    write_record(recipe, outcome=Outcome(kind=kind, step=1))
    assert (load_existing_result(recipe) is not None) == final


def test_unreadable_record_is_no_result(recipe: Recipe) -> None:
    """A damaged record counts as missing."""
    write_record(recipe)
    RunDir.from_recipe(recipe).record_file.write_text("{", encoding="utf-8")
    assert load_existing_result(recipe) is None


@pytest.mark.parametrize(("kind", "needs_model"), [("ok", True), ("oom", False)])
@pytest.mark.parametrize("save_model", [True, False])
def test_result_needs_the_saved_model(kind: OutcomeKind, needs_model: bool, save_model: bool, recipe: Recipe) -> None:
    """A finished run whose model was deleted is repeated, if its recipe saves one."""
    recipe = recipe.model_copy(update={"save_model": save_model})
    write_record(recipe, outcome=Outcome(kind=kind))
    RunDir.from_recipe(recipe).model_dir.rmdir()
    assert (load_existing_result(recipe) is None) == (needs_model and save_model)


def test_model_of_another_training_is_no_result(recipe: Recipe) -> None:
    """A run that was killed between its model and its record leaves the older record, which is not a result."""
    write_record(recipe, started_at="2026-01-02T00:00:00+00:00")
    identity = TrainingIdentity(
        run="run",
        started_at="2026-01-02T00:00:00+00:00",
        training_fingerprint=recipe.fingerprint_training(),
        measurement_fingerprint="b",
        model_fingerprint="c",
        data_fingerprint="d",
    )
    model_dir = RunDir.from_recipe(recipe).model_dir
    identity.write(model_dir)
    assert load_existing_result(recipe) is not None
    identity.model_copy(update={"started_at": "2026-01-03T00:00:00+00:00"}).write(model_dir)
    assert load_existing_result(recipe) is None
