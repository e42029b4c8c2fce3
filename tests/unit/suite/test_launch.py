"""Running a suite: states of waiting runs, older records, locked folders."""

from __future__ import annotations

import pytest

from peftbench.methods.full import Full
from peftbench.recipe.schema import Recipe
from peftbench.run_dir.lock import Lock
from peftbench.run_dir.refusal import Refusal, read_refusal, write_refusal
from peftbench.suite import launch
from peftbench.suite.launch import RunResult, run_one, run_suite
from peftbench.suite.results import ResultFinder
from peftbench.suite.status import find_unfinished_runs
from tests.helpers.records import minimal_record
from tests.helpers.workshop import Workshop


@pytest.fixture
def recipes(workshop: Workshop) -> list[Recipe]:
    """Return the recipes of two runs."""
    return [workshop.recipe(Full(), name=name) for name in ("first", "second")]


def test_waiting_runs_are_listed(recipes: list[Recipe], workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs are listed as waiting while the first one starts; a finished run is not listed."""
    states: list[list[tuple[str, str]]] = []

    def fake_run(recipe: Recipe, *_: object, **__: object) -> RunResult:
        states.append([(row.name, row.state) for row in find_unfinished_runs(workshop.output)])
        return RunResult(recipe.name, "ok")

    monkeypatch.setattr(launch, "run_one", fake_run)
    run_suite(recipes, None, lambda _: None)
    assert states[0] == [("first", "waiting"), ("second", "waiting")]
    (workshop.output / "first" / "recipe.yaml").unlink()
    monkeypatch.setattr(
        ResultFinder, "find_existing_result", lambda _, recipe: object() if recipe.name == "first" else None
    )
    assert [result.outcome for result in run_suite(recipes, None, lambda _: None)] == ["skipped", "ok"]
    assert not (workshop.output / "first" / "recipe.yaml").exists()


def test_older_record_keeps_its_recipe_until_the_run_starts(
    recipes: list[Recipe], workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the run waits, the folder keeps the recipe file that belongs to its record."""
    folder = workshop.output / "second"
    minimal_record().write(folder)
    (folder / "recipe.yaml").write_text("old: true\n", encoding="utf-8")
    recipe_files: list[str] = []

    def fake_run(recipe: Recipe, *_: object, **__: object) -> RunResult:
        recipe_files.append((folder / "recipe.yaml").read_text(encoding="utf-8"))
        return RunResult(recipe.name, "ok")

    monkeypatch.setattr(launch, "run_one", fake_run)
    run_suite(recipes, None, lambda _: None)
    assert recipe_files[0] == "old: true\n"


@pytest.mark.parametrize(("outcome", "is_kept"), [("crashed", True), ("refused", False), ("ok", False)])
def test_crash_without_files_is_kept(
    outcome: str, is_kept: bool, recipes: list[Recipe], workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends before it writes anything leaves its error to the suite; a refusal is its own to write."""
    results = iter([RunResult("first", outcome, "the process was killed"), RunResult("second", "ok")])
    monkeypatch.setattr(launch, "run_one", lambda *_, **__: next(results))
    run_suite(recipes, None, lambda _: None)
    expected = Refusal(outcome="crashed", error="the process was killed") if is_kept else None
    assert read_refusal(workshop.output / "first") == expected


def test_new_start_deletes_refusals(recipes: list[Recipe], workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs of the suite wait again, except one that another process runs."""
    folders = [workshop.output / recipe.name for recipe in recipes]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").touch()
        write_refusal(folder, Refusal(error="no such model"))
    states: list[str] = []

    def fake_run(recipe: Recipe, *_: object, **__: object) -> RunResult:
        states.extend(row.state for row in find_unfinished_runs(workshop.output))
        return RunResult(recipe.name, "ok")

    monkeypatch.setattr(launch, "run_one", fake_run)
    lock = Lock(folders[1])
    lock.acquire()
    run_suite(recipes, None, lambda _: None)
    lock.release()
    assert states[:2] == ["waiting", "running"]
    assert [read_refusal(folder) is None for folder in folders] == [True, False]


def test_run_in_a_locked_folder_is_refused(recipes: list[Recipe], workshop: Workshop) -> None:
    """Nothing is written to the folder, and the error for the report page has neither host nor process."""
    folders = [workshop.output / recipe.name for recipe in recipes]
    locks = []
    for folder in folders:
        folder.mkdir(parents=True)
        locks.append(Lock(folder))
        locks[-1].acquire()
    results = run_suite(recipes, None, lambda _: None)
    result = run_one(recipes[0], None)
    for lock in locks:
        lock.release()
    assert [suite_result.outcome for suite_result in results] == ["refused", "refused"]
    assert result.shareable_error == f"{folders[0]} is in use"
    assert not [path for folder in folders for path in folder.glob("recipe.yaml")]
