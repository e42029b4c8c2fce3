"""Runs of a suite, one after another: what is to be seen while they run."""

from __future__ import annotations

import pytest

from peftbench.methods.full import Full
from peftbench.recipe.schema import Recipe
from peftbench.run_dir.lock import Lock
from peftbench.suite import launch
from peftbench.suite.launch import RunResult, run_one, run_suite
from peftbench.suite.status import find_unfinished_runs
from tests.helpers.workshop import Workshop
from tests.unit.record.test_run_record import record


@pytest.fixture
def recipes(workshop: Workshop) -> list[Recipe]:
    """Two runs."""
    return [workshop.recipe(Full(), name=name) for name in ("first", "second")]


def test_runs_that_wait_are_seen(recipes: list[Recipe], workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the first begins, whoever looks is told of all; what is finished already is not made to wait again."""
    seen: list[list[tuple[str, str]]] = []

    def look(recipe: Recipe, *_: object, **__: object) -> RunResult:
        seen.append([(one.name, one.state) for one in find_unfinished_runs(workshop.output)])
        return RunResult(recipe.name, "ok")

    monkeypatch.setattr(launch, "run_one", look)
    run_suite(recipes, None, lambda _: None)
    assert seen[0] == [("first", "waiting"), ("second", "waiting")]
    (workshop.output / "first" / "recipe.yaml").unlink()
    monkeypatch.setattr(launch, "result_of", lambda recipe: object() if recipe.name == "first" else None)
    assert [result.outcome for result in run_suite(recipes, None, lambda _: None)] == ["skipped", "ok"]
    assert not (workshop.output / "first" / "recipe.yaml").exists()


def test_an_older_record_keeps_its_recipe_until_its_turn(
    recipes: list[Recipe], workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result of a recipe that has changed since does not stand beside the new one while that waits."""
    folder = workshop.output / "second"
    record().write(folder)
    (folder / "recipe.yaml").write_text("old: true\n", encoding="utf-8")
    seen: list[str] = []

    def look(recipe: Recipe, *_: object, **__: object) -> RunResult:
        seen.append((folder / "recipe.yaml").read_text(encoding="utf-8"))
        return RunResult(recipe.name, "ok")

    monkeypatch.setattr(launch, "run_one", look)
    run_suite(recipes, None, lambda _: None)
    assert seen[0] == "old: true\n"


def test_a_folder_that_another_holds_is_left_alone(recipes: list[Recipe], workshop: Workshop) -> None:
    """No recipe goes there, the run is refused, and what a page says of it names no machine and no process."""
    folders = [workshop.output / recipe.name for recipe in recipes]
    locks = []
    for folder in folders:
        folder.mkdir(parents=True)
        locks.append(Lock(folder))
        locks[-1].acquire()
    results = run_suite(recipes, None, lambda _: None)
    alone = run_one(recipes[0], None)
    for lock in locks:
        lock.release()
    assert [result.outcome for result in results] == ["refused", "refused"]
    assert alone.shareable_error == f"{folders[0]} is in use"
    assert not [path for folder in folders for path in folder.glob("recipe.yaml")]
