"""The file with the reason why a run did not start: who writes it, and what deletes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from peftbench import train
from peftbench.errors import ModelNotFoundError, OutOfRangeError, PeftbenchError, RunLockedError
from peftbench.methods.baselines import Lead
from peftbench.recipe.schema import Recipe
from peftbench.run_dir.refusal import Refusal, read_refusal, write_refusal
from peftbench.run_dir.stop_request import ATTEMPT_ENV
from tests.helpers.project import write_project
from tests.helpers.workshop import Workshop


def _refuse(folder: Path, error: PeftbenchError, monkeypatch: pytest.MonkeyPatch) -> Refusal | None:
    """Start a run in ``folder`` that is refused with ``error``; return what its folder keeps."""

    def run_recipe(_: Recipe) -> None:
        raise error

    monkeypatch.chdir(write_project(folder))
    monkeypatch.setattr(train, "run_recipe", run_recipe)
    with pytest.raises(typer.Exit) as raised:
        train.train_from_arguments(["recipe.yaml"], [])
    assert raised.value.exit_code == error.exit_code
    return read_refusal(Path("out/run"))


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Return a project whose run has a folder with a recipe, as a suite prepares it."""
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "recipe.yaml").touch()
    return tmp_path


@pytest.mark.parametrize("error", [ModelNotFoundError("no model", "set another"), OutOfRangeError("8 > 4")])
def test_refused_run_of_a_suite_keeps_its_sentence(
    error: PeftbenchError, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence is the one that is printed, with its hint."""
    monkeypatch.setenv(ATTEMPT_ENV, "host-1")
    assert _refuse(prepared, error, monkeypatch) == Refusal(error=str(error))


def test_refusal_needs_a_suite_and_its_folder(
    prepared: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run started by hand, one without a prepared folder, and one in a folder in use write nothing."""
    monkeypatch.delenv(ATTEMPT_ENV, raising=False)
    assert _refuse(prepared, OutOfRangeError("no"), monkeypatch) is None
    monkeypatch.setenv(ATTEMPT_ENV, "host-1")
    assert _refuse(prepared, RunLockedError("in use"), monkeypatch) is None
    other = tmp_path_factory.mktemp("other")
    assert _refuse(other, OutOfRangeError("no"), monkeypatch) is None
    assert not (other / "out").exists()


def test_second_rank_keeps_nothing(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main process writes to the folder."""
    monkeypatch.setenv(ATTEMPT_ENV, "host-1")
    monkeypatch.setenv("RANK", "1")
    assert _refuse(prepared, OutOfRangeError("no"), monkeypatch) is None


def test_start_of_the_run_deletes_it(workshop: Workshop) -> None:
    """A run that starts is not refused."""
    recipe = workshop.recipe(Lead())
    folder = workshop.output / "run"
    folder.mkdir()
    (folder / "recipe.yaml").touch()
    write_refusal(folder, Refusal(error="no such model"))
    assert read_refusal(folder) is not None
    workshop.run(recipe)
    assert read_refusal(folder) is None
