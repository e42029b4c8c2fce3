"""A tracker that cannot write is switched off and noted, and the training continues."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker

from peftbench.methods.lora import Lora
from peftbench.record import read_record
from peftbench.record.run_record import RECORD_FILE
from peftbench.run.trackers import _NAME_SETTERS, _RUN_NAME_KEYS
from tests.helpers.disks import mount_tmpfs
from tests.helpers.workshop import Workshop

TRACKED: dict[str, Any] = {"trackers": ("tensorboard",)}


def read_losses(workshop: Workshop) -> list[float]:
    """Return the losses that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(workshop.output / "run" / "peftbench"))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def test_every_step_is_logged(workshop: Workshop) -> None:
    """TensorBoard has the loss of each step, in the run's folder, and the record has no note."""
    record = workshop.run(workshop.recipe(Lora(r=2), **TRACKED))
    assert read_losses(workshop) == pytest.approx(record.step_losses)
    assert record.notes == ()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ConnectionError("lost"), KeyError()]
)
def test_error_of_a_tracker_does_not_end_the_training(
    error: Exception, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not called again after its first error; the note names it, the step and the error."""
    log, calls = TensorBoardTracker.log, []

    def fail_at_second_step(self: TensorBoardTracker, values: dict[str, Any], step: int, **kwargs: object) -> None:
        calls.append(step)
        if step == 2:
            raise error
        log(self, values, step, **kwargs)

    monkeypatch.setattr(TensorBoardTracker, "log", fail_at_second_step)
    record = workshop.run(workshop.recipe(Lora(r=2), **TRACKED))
    assert record.outcome.kind == "ok"
    assert len(record.step_losses) == 3
    assert calls == [1, 2]
    (note,) = record.notes
    assert note.startswith("the tracker tensorboard was switched off after step 2: ")
    assert str(error) in note
    assert f"warning: {note}" in capsys.readouterr().err


def test_error_at_the_end_is_in_the_record(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is written before the trackers end, and written again with the note."""

    def fail(_: TensorBoardTracker) -> None:
        assert read_record(workshop.output / "run" / RECORD_FILE).notes == ()
        raise ConnectionError("lost")

    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    record = workshop.run(workshop.recipe(Lora(r=2), **TRACKED))
    assert record.outcome.kind == "ok"
    assert record.notes == ("the tracker tensorboard was switched off after step 3: lost",)
    assert read_record(workshop.output / "run" / RECORD_FILE) == record


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of its writer
def test_full_disk_of_a_tracker_does_not_end_the_training(workshop: Workshop) -> None:
    """The tracker's folder is on a disk that is full."""
    folder = workshop.output / "run" / "peftbench"
    with mount_tmpfs(folder, "size=4k"):
        (folder / "filler").write_bytes(bytes(4096))
        record = workshop.run(workshop.recipe(Lora(r=2), **TRACKED))
    assert record.outcome.kind == "ok"
    assert "tensorboard was switched off" in record.notes[0]


def test_tracker_that_cannot_start_is_switched_off(workshop: Workshop) -> None:
    """A file is in the place of its folder."""
    (workshop.output / "run").mkdir()
    (workshop.output / "run" / "peftbench").write_text("", encoding="utf-8")
    record = workshop.run(workshop.recipe(Lora(r=2), **TRACKED))
    assert record.outcome.kind == "ok"
    assert record.notes[0].startswith("the tracker tensorboard was switched off after step 0: ")


def test_each_tracker_gets_the_name_of_the_run(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one suite have different names in every tracker that a recipe can use."""
    from peftbench.recipe.schema import Recipe

    names = {"tensorboard", *_RUN_NAME_KEYS, *_NAME_SETTERS}
    allowed = Recipe.model_json_schema()["properties"]["trackers"]["items"]["enum"]
    assert names == set(allowed)
    given: dict[str, str] = {}

    def build_tracker(name: str) -> type[GeneralTracker]:
        class Recorder(GeneralTracker):  # type: ignore[misc]
            requires_logging_directory = name == "aim"
            main_process_only = True
            tracker: Any

            def __init__(self, project: str, *folder: str, **arguments: str) -> None:
                self.name = name
                self.tracker = self
                assert project == "peftbench"
                given[name] = arguments.get(_RUN_NAME_KEYS.get(name, ""), "")

            def set_name(self, run: str) -> None:
                given[name] = run

            def __setattr__(self, key: str, value: object) -> None:
                if key == "name":
                    given[name] = str(value)
                object.__setattr__(self, key, value)

        return Recorder

    for name in allowed:
        if name != "tensorboard":
            monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, build_tracker(name))
    monkeypatch.setattr("peftbench.distributed.preflight.check_trackers", lambda _: None)
    record = workshop.run(workshop.recipe(Lora(r=2), trackers=tuple(allowed)))
    assert record.notes == ()
    assert given == dict.fromkeys(names - {"tensorboard"}, "run")
