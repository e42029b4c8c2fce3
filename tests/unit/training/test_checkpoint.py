"""Checkpoints: writes are atomic, and a checkpoint belongs to one recipe."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from peftbench.errors import CheckpointError, DiskFullError, OutputError
from peftbench.methods.full import Full
from peftbench.recipe.schema import Checkpoint, Profile
from peftbench.record import RunRecord
from peftbench.training import checkpoint, serialization
from peftbench.training.checkpoint import CheckpointManager, CheckpointMetadata
from peftbench.training.state import _get_rng_state, _set_rng_state
from tests.helpers.methods import one_method_fast
from tests.helpers.paths import RECORD_V1
from tests.helpers.stopped_runs import run_until_first_checkpoint
from tests.helpers.workshop import Workshop

METADATA = CheckpointMetadata("training", "settings", "model", "data", "single", 1, "cpu", {"torch": "1"})

MakeManager = Callable[..., CheckpointManager]


@pytest.fixture
def make_manager(accelerator: Accelerator, tmp_path: Path) -> MakeManager:
    """Return a function that builds a run's checkpoint manager, with changes to its metadata."""

    def build(keep: int = 2, **changes: object) -> CheckpointManager:
        return CheckpointManager(accelerator, tmp_path, dataclasses.replace(METADATA, **changes), keep)  # type: ignore[arg-type]

    return build


def state(value: float) -> dict[str, object]:
    """Return a state to save."""
    return {"weights": {"a": torch.full((8,), value)}, "step": value}


def load_latest_step(manager: CheckpointManager) -> object:
    """Return the step in the newest checkpoint."""
    checkpoint = manager.latest()
    assert checkpoint is not None
    return manager.load(checkpoint)[0]["step"]


def test_newest_checkpoints_are_kept_and_the_latest_is_loaded(make_manager: MakeManager) -> None:
    """Older checkpoints are deleted, and ``delete_all`` deletes the folder."""
    manager = make_manager(keep=2)
    assert manager.latest() is None
    for step in (5, 10, 100):
        manager.save(step, state(step))
    assert [path.name for path in manager.list_checkpoints()] == ["step-00000100", "step-00000010"]
    newest = manager.latest()
    assert newest is not None
    assert newest.path == manager.list_checkpoints()[0]
    loaded, own = manager.load(newest)
    assert own
    assert loaded["weights"]["a"].eq(100).all()
    manager.delete_all()
    assert not manager.directory.exists()


def test_checkpoint_of_the_same_step_is_replaced(make_manager: MakeManager) -> None:
    """This happens after a run resumed from an earlier step."""
    manager = make_manager()
    manager.save(5, state(1))
    manager.save(5, state(2))
    assert len(manager.list_checkpoints()) == 1
    assert load_latest_step(manager) == 2


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "metadata"])
def test_damaged_checkpoint_is_deleted_and_the_previous_one_loaded(damage: str, make_manager: MakeManager) -> None:
    """A file is truncated, changed or missing, or the metadata is invalid."""
    manager = make_manager()
    manager.save(1, state(1))
    manager.save(2, state(2))
    newest = manager.list_checkpoints()[0]
    file = newest / "rank-0" / serialization.TENSORS_FILE
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-3])
    elif damage == "changed":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "checkpoint.json").write_text("{", encoding="utf-8")
    assert load_latest_step(manager) == 1
    assert manager.notes == ["the checkpoint step-00000002 was damaged; deleted"]
    assert [path.name for path in manager.list_checkpoints()] == ["step-00000001"]


@pytest.mark.parametrize("has_record", [False, True], ids=["checkpoint_only", "with_record"])
def test_checkpoint_of_the_old_format_is_refused(has_record: bool, make_manager: MakeManager, tmp_path: Path) -> None:
    """The refusal names the checkpoint and the record of schema 1, and nothing is deleted."""
    old = tmp_path / "checkpoints" / "0123456789abcdef" / "step-00000005"
    (old / "rank-0").mkdir(parents=True)
    origin = {"recipe_fingerprint": "recipe", "model_identity": "model", "data_identity": "data", "processes": 1}
    (old / "checkpoint.json").write_text(json.dumps({"step": 5, "origin": origin, "files": {}}), encoding="utf-8")
    if has_record:
        shutil.copy(RECORD_V1, tmp_path / "record.json")
    with pytest.raises(CheckpointError) as refusal:
        make_manager().latest()
    replaced = f"; the run then replaces {tmp_path / 'record.json'}, a record of schema 1" if has_record else ""
    assert str(refusal.value) == (
        f"Cannot resume from {old}: it has checkpoint format 1, and this version reads format 3; "
        f"delete {old.parent} to start over{replaced}"
    )
    assert (old / "checkpoint.json").exists()


def test_full_disk_keeps_the_previous_checkpoint(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The incomplete checkpoint is deleted."""
    manager = make_manager()
    manager.save(1, state(1))

    def raise_disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", raise_disk_full)
    with pytest.raises(DiskFullError, match="step-00000002 could not be written"):
        manager.save(2, state(2))
    assert [path.name for path in manager.directory.iterdir()] == ["step-00000001"]


def test_write_error_of_another_process_is_raised(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process wrote its part and the disk of the other is full: the incomplete checkpoint is deleted."""
    manager = make_manager(engine="zero2", world_size=2)
    manager.save(1, state(1))
    disk_full = (errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "all_gather_objects", lambda _, mine: [mine, disk_full])
    with pytest.raises(DiskFullError, match="step-00000002 could not be written"):
        manager.save(2, state(2))
    assert [path.name for path in manager.directory.iterdir()] == ["step-00000001"]


def test_read_error_of_another_process_is_raised(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process resumes alone."""
    manager = make_manager()
    manager.save(1, state(1))
    checkpoint_ref = manager.latest()
    assert checkpoint_ref is not None
    monkeypatch.setattr(checkpoint, "all_gather_objects", lambda _, mine: [mine, "process 1 cannot read its part"])
    with pytest.raises(CheckpointError, match="process 1 cannot read its part; delete"):
        manager.load(checkpoint_ref)


def test_missing_part_of_another_process_is_refused(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a shared folder, each process would have a part of the checkpoint only."""
    manager = make_manager(engine="zero2", world_size=2)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(checkpoint, "all_gather_objects", lambda _, mine: [mine])
    with pytest.raises(OutputError, match="the files of process 1 are missing: all processes must share this folder"):
        manager.save(1, state(1))


def test_unfinished_checkpoint_is_ignored_and_replaced(make_manager: MakeManager) -> None:
    """A killed process leaves an unfinished folder; it is not loaded, and the step can be saved again."""
    manager = make_manager()
    partial_dir = manager.directory / "step-00000003.unfinished" / "rank-0"
    serialization.save_tree(state(3), partial_dir)
    assert manager.latest() is None
    manager.save(3, state(4))
    assert load_latest_step(manager) == 4
    assert len(list(manager.directory.iterdir())) == 1


@pytest.mark.parametrize("field", ["training_fingerprint", "model_fingerprint", "data_fingerprint"])
def test_checkpoints_of_another_training_are_ignored_and_kept(field: str, make_manager: MakeManager) -> None:
    """Another recipe, base model or data: its checkpoints are not loaded, not deleted, and noted."""
    make_manager().save(1, state(1))
    make_manager().save(9, state(9))
    other = make_manager(keep=1, **{field: "another"})
    assert other.latest() is None
    assert "another training (recipe, base model or data)" in other.notes[0]
    other.save(5, state(5))  # an earlier step than the other training's
    assert load_latest_step(other) == 5
    other.delete_all()
    assert load_latest_step(make_manager()) == 9
    assert len(make_manager().list_checkpoints()) == 2


@pytest.mark.parametrize(
    ("changes", "difference"),
    [({"device": "cuda"}, "device cpu instead of cuda"), ({"versions": {"torch": "2"}}, "torch 1 instead of 2")],
)
def test_checkpoint_of_another_device_or_library_version_is_refused(
    changes: dict[str, object], difference: str, make_manager: MakeManager
) -> None:
    """The format of a state can differ there; the error has both values."""
    make_manager().save(1, state(1))
    with pytest.raises(
        CheckpointError, match=f"it was written with {difference}; launch with the same settings, or delete"
    ):
        make_manager(**changes).latest()


def test_number_of_processes_can_change_only_with_a_replicated_model(make_manager: MakeManager) -> None:
    """A replicated model resumes on any number of processes; a sharded one is refused."""
    make_manager().save(1, state(1))
    ddp = make_manager(engine="ddp", world_size=4)
    checkpoint_ref = ddp.latest()
    assert checkpoint_ref is not None
    assert ddp.load(checkpoint_ref)[1] is False
    ddp.delete_all()
    make_manager(engine="zero2", world_size=2).save(1, state(1))
    assert make_manager(engine="zero2", world_size=2).latest() is not None
    for changes in ({"engine": "zero2", "world_size": 4}, {"engine": "zero3", "world_size": 2}, {}):
        with pytest.raises(CheckpointError, match=r"written with (engine zero2|processes 2) instead of"):
            make_manager(**changes).latest()


def test_checkpoints_are_kept_until_the_record_is_written(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill or a full disk before that, only the evaluation runs again."""
    recipe = workshop.recipe(Full(), train={"steps": 4}).model_copy(update={"checkpoint": Checkpoint(interval=2)})

    def exit_process(*_: object) -> Path:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "write", exit_process)
        with pytest.raises(SystemExit):
            workshop.run(recipe)
    record = workshop.run(recipe)
    assert record.resumed_after == (4,)
    assert len(record.step_losses) == 4
    assert not (workshop.output / recipe.name / "checkpoints").exists()


def test_random_numbers_continue_after_restoring_the_state() -> None:
    """Restore the generators of Python, numpy and torch."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: S311

    rng_state = _get_rng_state()
    expected = draw()
    draw()
    _set_rng_state(rng_state)
    assert draw() == expected


@one_method_fast("lora")
def test_resumed_run_is_bit_identical(method: Full, workshop: Workshop) -> None:
    """The run has dropout, gradient accumulation and a schedule; its record has the step it resumed from."""
    settings: dict[str, Any] = {
        "train": {"steps": 8, "micro_batch_size": 4},
        "model": {"dropout": 0.2},
        "save_model": True,
    }
    uninterrupted = workshop.run(workshop.recipe(method, name="uninterrupted", **settings))
    recipe = workshop.recipe(method, name="stopped", checkpoint=Checkpoint(interval=3), **settings)
    run_until_first_checkpoint(workshop, recipe)
    resumed = workshop.run(recipe)
    assert resumed.step_losses == uninterrupted.step_losses
    assert resumed.quality == uninterrupted.quality
    assert (resumed.tokens, resumed.flops, resumed.steps) == (uninterrupted.tokens, uninterrupted.flops, 8)
    assert resumed.resumed_after == (3,)
    assert "Resumed from step 3." in resumed.notes
    assert uninterrupted.resumed_after == ()
    assert len(resumed.step_seconds) == 8
    assert not (workshop.output / "stopped" / "checkpoints").exists()


def test_measurements_of_a_resumed_run(workshop: Workshop) -> None:
    """Throughput excludes the first steps of each process; counts and breakdown from before the stop are kept."""
    recipe = workshop.recipe(
        Full(),
        train={"steps": 9},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
        checkpoint=Checkpoint(interval=4),
    )
    run_until_first_checkpoint(workshop, recipe)
    record = workshop.run(recipe)
    assert record.throughput is not None
    assert record.throughput.steps == (4 - 2) + (5 - 2)
    assert record.flops.counted_step is not None
    assert record.flops.counted_step.counted_flops == record.flops.counted_step.closed_form_flops
    assert record.memory_breakdown is not None
    assert record.memory_breakdown.step == 2
