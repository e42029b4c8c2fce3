"""``peftbench run --dry-run``: what each run would do and why, its disk space and hours."""

from __future__ import annotations

import pytest

from peftbench.errors import HubUnreachableError
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.recipe.schema import Checkpoint, Recipe
from peftbench.record import Outcome
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import Lock
from peftbench.suite.dry_run import format_planned_runs, plan_runs
from peftbench.training.auto_settings import resolve_for_launch
from tests.helpers.records import minimal_record
from tests.helpers.workshop import Workshop


@pytest.fixture
def recipe(workshop: Workshop) -> Recipe:
    """Return a recipe of LoRA whose model is not saved."""
    return workshop.recipe(Lora(r=2))


def write_record(recipe: Recipe, kind: str = "ok", **changes: object) -> None:
    """Write a record of ``recipe`` that trained for an hour."""
    resolved, _ = resolve_for_launch(recipe)
    values = {
        "recipe": resolved.model_dump(mode="json"),
        "recipe_fingerprint": resolved.fingerprint(),
        "data_fingerprint": recipe.data.source.fingerprint(),
        "outcome": Outcome(kind=kind),  # type: ignore[arg-type]
        "phase_seconds": {"train": 3600.0},
    }
    minimal_record(name=recipe.name, **(values | changes)).write(RunDir.from_recipe(recipe).path)


def test_new_run_has_no_record(recipe: Recipe) -> None:
    """Its hours are unknown, and nothing is written."""
    (run,) = plan_runs([recipe], None)
    assert (run.action, run.reason, run.disk_bytes, run.hours) == ("run", "no record", 0, None)
    assert not RunDir.from_recipe(recipe).path.exists()


def test_finished_run_is_skipped(recipe: Recipe) -> None:
    """It takes neither space nor time."""
    write_record(recipe)
    (run,) = plan_runs([recipe], None)
    assert (run.action, run.reason, run.disk_bytes, run.hours) == ("skip", "finished", 0, 0.0)
    assert format_planned_runs([run]).endswith("nothing to run")


def test_changed_recipe_runs_again_with_the_changed_keys(recipe: Recipe) -> None:
    """The hours of another recipe are not those of this one."""
    write_record(recipe)
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 4})})
    (run,) = plan_runs([changed], None)
    assert (run.action, run.reason, run.hours) == ("run", "train.steps was 3, now 4", None)


def test_failed_run_runs_again(recipe: Recipe) -> None:
    """The reason is the outcome of the last attempt."""
    write_record(recipe, "failed")
    assert plan_runs([recipe], None)[0].reason == "its last attempt ended as failed"


def test_changed_data_runs_again(recipe: Recipe) -> None:
    """The recipe is unchanged, and its data is not; the hours of the last run are known."""
    write_record(recipe, data_fingerprint="other")
    (run,) = plan_runs([recipe], None)
    assert (run.reason, run.hours) == ("its data has changed", 1.0)


def test_disk_space_of_models_and_checkpoints(workshop: Workshop) -> None:
    """A full model is saved whole, an adapter alone; one checkpoint more than is kept exists while it is written."""
    checkpoint = Checkpoint(interval=1, keep_latest=2)
    full, lora = (
        workshop.recipe(method, save_model=True, checkpoint=checkpoint, name=method.kind)
        for method in (Full(), Lora(r=2))
    )
    runs = plan_runs([full, lora], None)
    trained = (366_336, 2 * 2 * (64 + 192 + 64 + 64 + 64 + 256 + 256 + 64))
    tensors = (2 * 12 + 4, 2 * 4 * 2)
    for run, count, number in zip(runs, trained, tensors, strict=True):
        states = 8 * count + 4 * number  # two moments of each number, and a step counter of each tensor
        assert run.disk_bytes == 4 * count + 3 * (4 * count + states)


def test_locked_run_is_skipped(recipe: Recipe) -> None:
    """``run`` would refuse it while the other process lives."""
    run_dir = RunDir.from_recipe(recipe)
    run_dir.create()
    lock = Lock(run_dir.path)
    lock.acquire()
    try:
        (run,) = plan_runs([recipe], None)
    finally:
        lock.release()
    assert (run.action, run.reason) == ("skip", "another process has locked its folder")


def test_unreachable_hub_is_asked_once(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other runs of the same model have an unknown size without another attempt."""
    asked: list[str] = []

    def measure(recipe: Recipe) -> None:
        asked.append(recipe.model.path)
        raise HubUnreachableError("the Hub did not answer")

    monkeypatch.setattr("peftbench.memory.lower_bound.measure_tensors", measure)
    recipes = [workshop.recipe(method, name=method.kind) for method in (Full(), Lora(r=2))]
    runs = plan_runs(recipes, None)
    assert [run.disk_bytes for run in runs] == [None, None]
    assert asked == [recipes[0].model.path]
