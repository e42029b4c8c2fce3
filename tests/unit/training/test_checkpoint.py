"""Checkpoints are whole or not there, and belong to one recipe."""

from __future__ import annotations

import dataclasses
import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from peftbench.errors import CheckpointError, DiskFullError, OutputError
from peftbench.methods.full import Full
from peftbench.recipe.schema import Checkpoint, Profile, Recipe
from peftbench.record import RunRecord
from peftbench.training import checkpoint, serialization
from peftbench.training.checkpoint import CheckpointManager, CheckpointMetadata
from peftbench.training.state import _get_rng_state, _set_rng_state
from tests.helpers.methods import every_method
from tests.helpers.workshop import Workshop

ORIGIN = CheckpointMetadata("recipe", "model", "data", "single", 1, "cpu", {"torch": "1"})

Make = Callable[..., CheckpointManager]


@pytest.fixture
def make(accelerator: Accelerator, tmp_path: Path) -> Make:
    """Checkpoints of a run, with changes to where they come from."""

    def made(keep: int = 2, **changes: object) -> CheckpointManager:
        return CheckpointManager(accelerator, tmp_path, dataclasses.replace(ORIGIN, **changes), keep)  # type: ignore[arg-type]

    return made


def state(value: float) -> dict[str, object]:
    """Something to keep."""
    return {"weights": {"a": torch.full((8,), value)}, "step": value}


def step_of(kept: CheckpointManager) -> object:
    """What the newest checkpoint holds."""
    found = kept.latest()
    assert found is not None
    return kept.load(found)[0]["step"]


def test_the_newest_few_are_kept(make: Make) -> None:
    """The last n, and the last of them is read."""
    kept = make(keep=2)
    assert kept.latest() is None
    for step in (5, 10, 100):
        kept.save(step, state(step))
    assert [path.name for path in kept.list_checkpoints()] == ["step-00000100", "step-00000010"]
    newest = kept.latest()
    assert newest is not None
    assert newest.path == kept.list_checkpoints()[0]
    found, own = kept.load(newest)
    assert own
    assert found["weights"]["a"].eq(100).all()
    kept.delete_all()
    assert not kept.directory.exists()


def test_a_checkpoint_of_the_same_step_takes_its_place(make: Make) -> None:
    """As after a run that went on from before it."""
    kept = make()
    kept.save(5, state(1))
    kept.save(5, state(2))
    assert len(kept.list_checkpoints()) == 1
    assert step_of(kept) == 2


@pytest.mark.parametrize("damage", ["cut", "other", "missing", "meta"])
def test_one_that_is_not_whole_is_passed_over(damage: str, make: Make) -> None:
    """A file that is cut, changed or gone: the one before is taken."""
    kept = make()
    kept.save(1, state(1))
    kept.save(2, state(2))
    newest = kept.list_checkpoints()[0]
    file = newest / "rank-0" / serialization.TENSORS_FILE
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-3])
    elif damage == "other":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "checkpoint.json").write_text("{", encoding="utf-8")
    assert step_of(kept) == 1
    assert kept.notes == ["the checkpoint step-00000002 was damaged; deleted"]
    assert [path.name for path in kept.list_checkpoints()] == ["step-00000001"]


def test_a_full_disk_leaves_the_one_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written, and the last good one is there."""
    kept = make()
    kept.save(1, state(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    with pytest.raises(DiskFullError, match="step-00000002 could not be written"):
        kept.save(2, state(2))
    assert [path.name for path in kept.directory.iterdir()] == ["step-00000001"]


def test_what_another_process_cannot_write_is_refused_by_all(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one wrote its part and hears of the other's full disk; nothing is left of either."""
    kept = make(engine="zero2", world_size=2)
    kept.save(1, state(1))
    full = (errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "all_gather_objects", lambda _, mine: [mine, full])
    with pytest.raises(DiskFullError, match="step-00000002 could not be written"):
        kept.save(2, state(2))
    assert [path.name for path in kept.directory.iterdir()] == ["step-00000001"]


def test_a_part_that_another_process_cannot_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All refuse, and none goes on alone."""
    kept = make()
    kept.save(1, state(1))
    found = kept.latest()
    assert found is not None
    monkeypatch.setattr(checkpoint, "all_gather_objects", lambda _, mine: [mine, "process 1 cannot read its part"])
    with pytest.raises(CheckpointError, match="process 1 cannot read its part; delete"):
        kept.load(found)


def test_a_part_that_is_not_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do not share the folder would each have half a checkpoint."""
    kept = make(engine="zero2", world_size=2)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(checkpoint, "all_gather_objects", lambda _, mine: [mine])
    with pytest.raises(OutputError, match="the files of process 1 are missing: all processes must share this folder"):
        kept.save(1, state(1))


def test_what_was_left_by_a_kill_is_no_checkpoint(make: Make) -> None:
    """A folder that was not finished is neither read nor in the way."""
    kept = make()
    unfinished = kept.directory / "step-00000003.unfinished" / "rank-0"
    serialization.save_tree(state(3), unfinished)
    assert kept.latest() is None
    kept.save(3, state(4))
    assert step_of(kept) == 4
    assert len(list(kept.directory.iterdir())) == 1


@pytest.mark.parametrize("what", ["recipe_fingerprint", "model_fingerprint", "data_fingerprint"])
def test_of_another_recipe(what: str, make: Make) -> None:
    """What another recipe, base or data left is neither gone on with nor taken away, and that is said."""
    make().save(1, state(1))
    make().save(9, state(9))
    other = make(keep=1, **{what: "another"})
    assert other.latest() is None
    assert "another recipe, base model or data" in other.notes[0]
    other.save(5, state(5))  # an earlier step than those
    assert step_of(other) == 5
    other.delete_all()
    assert step_of(make()) == 9
    assert len(make().list_checkpoints()) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"device": "cuda"}, "device cpu instead of cuda"), ({"versions": {"torch": "2"}}, "torch 1 instead of 2")],
)
def test_another_device_or_library(changes: dict[str, object], said: str, make: Make) -> None:
    """States have other forms there: refused, with what was and what is."""
    make().save(1, state(1))
    with pytest.raises(CheckpointError, match=f"it was written with {said}. Launch with the same settings, or delete"):
        make(**changes).latest()


def test_another_number_of_processes(make: Make) -> None:
    """Where each has everything, any number goes on; where parts are kept, it is refused in a sentence."""
    make().save(1, state(1))
    several = make(engine="ddp", world_size=4)
    found = several.latest()
    assert found is not None
    assert several.load(found)[1] is False
    several.delete_all()
    make(engine="zero2", world_size=2).save(1, state(1))
    assert make(engine="zero2", world_size=2).latest() is not None
    for changes in ({"engine": "zero2", "world_size": 4}, {"engine": "zero3", "world_size": 2}, {}):
        with pytest.raises(CheckpointError, match=r"written with (engine zero2|processes 2) instead of"):
            make(**changes).latest()


def test_a_record_that_cannot_be_written_costs_no_training(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints stay until the record is there: a kill or a full disk before that costs the evaluation alone."""
    recipe = workshop.recipe(Full(), train={"steps": 4}).model_copy(update={"checkpoint": Checkpoint(interval=2)})

    def killed(*_: object) -> Path:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "write", killed)
        with pytest.raises(SystemExit):
            workshop.run(recipe)
    record = workshop.run(recipe)
    assert record.resumed_after == (4,)
    assert len(record.step_losses) == 4
    assert not (workshop.output / recipe.name / "checkpoints").exists()


def test_random_numbers_go_on() -> None:
    """Python's, numpy's and torch's."""

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: S311

    kept = _get_rng_state()
    expected = drawn()
    drawn()
    _set_rng_state(kept)
    assert drawn() == expected


class StoppedError(Exception):
    """As a kill between two steps."""


def stopped_at_a_checkpoint(workshop: Workshop, recipe: Recipe) -> None:
    """Run ``recipe`` until its first checkpoint is written."""
    save = CheckpointManager.save

    def saved_and_stopped(self: CheckpointManager, step: int, kept: dict[str, object]) -> None:
        save(self, step, kept)
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointManager, "save", saved_and_stopped)
        with pytest.raises(StoppedError):
            workshop.run(recipe)


@every_method
def test_a_run_goes_on_to_the_last_bit(method: Full, workshop: Workshop) -> None:
    """With dropout, accumulation and a schedule; the record says where."""
    knobs: dict[str, Any] = {
        "train": {"steps": 8, "micro_batch_size": 4},
        "model": {"dropout": 0.2},
        "save_model": True,
    }
    undisturbed = workshop.run(workshop.recipe(method, name="undisturbed", **knobs))
    recipe = workshop.recipe(method, name="stopped", checkpoint=Checkpoint(interval=3), **knobs)
    stopped_at_a_checkpoint(workshop, recipe)
    resumed = workshop.run(recipe)
    assert resumed.step_losses == undisturbed.step_losses
    assert resumed.quality == undisturbed.quality
    assert (resumed.tokens, resumed.flops, resumed.steps) == (undisturbed.tokens, undisturbed.flops, 8)
    assert resumed.resumed_after == (3,)
    assert "Resumed from step 3." in resumed.notes
    assert undisturbed.resumed_after == ()
    assert len(resumed.step_seconds) == 8
    assert not (workshop.output / "stopped" / "checkpoints").exists()


def test_figures_of_a_run_that_went_on(workshop: Workshop) -> None:
    """The first steps of each process are in none; counts and the breakdown of steps not done again are kept."""
    recipe = workshop.recipe(
        Full(),
        train={"steps": 9},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
        checkpoint=Checkpoint(interval=4),
    )
    stopped_at_a_checkpoint(workshop, recipe)
    record = workshop.run(recipe)
    assert record.throughput is not None
    assert record.throughput.steps == (4 - 2) + (5 - 2)
    assert record.flops.counted_step is not None
    assert record.flops.counted_step.counted_flops == record.flops.counted_step.closed_form_flops
    assert record.memory_breakdown is not None
    assert record.memory_breakdown.step == 2
