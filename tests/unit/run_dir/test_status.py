"""status.json, which a run writes while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftbench.run_dir.layout import STATUS_FILE
from peftbench.run_dir.status import StatusWriter, get_slurm_job_id, read_status


def test_phases_are_written_at_once_and_steps_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens per second cover the steps since the last write; time left is at this process's mean step time."""
    clock = [100.0]
    monkeypatch.setattr("peftbench.run_dir.status.time.monotonic", lambda: clock[0])
    writer = StatusWriter(tmp_path, enabled=True)
    writer.set_phase("train")
    assert (read_status(tmp_path) or pytest.fail("no status")).phase == "train"
    for step in range(11, 19):  # resumed after step 10, two seconds per step
        clock[0] += 2
        writer.update_step(step, 30, 50, loss=step / 8)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.step, status.total_steps) == (16, 30)
    assert status.tokens_per_second == pytest.approx(25)
    assert status.seconds_left == pytest.approx(2 * 14)
    assert (status.loss, status.memory_bytes, status.budget_bytes) == (2.0, None, None)
    clock[0] += 0.1
    writer.update_step(30, 30, 50, loss=1.5)
    assert (read_status(tmp_path) or status).step == 30


def test_steps_of_an_earlier_process_are_written(tmp_path: Path) -> None:
    """They are part of the next status, even if this process trains no step."""
    writer = StatusWriter(tmp_path, enabled=True)
    writer.start_training(30, 30, loss=2.5)
    writer.set_phase("evaluate")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.phase, status.step, status.total_steps, status.loss) == ("evaluate", 30, 30, 2.5)


def test_memory_is_read_once_per_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is read only when a step is written; a later phase keeps the value of the last step."""
    clock = [100.0]
    monkeypatch.setattr("peftbench.run_dir.status.time.monotonic", lambda: clock[0])
    sizes = [200, 100]
    writer = StatusWriter(tmp_path, enabled=True)
    writer.start_training(0, 9, read_memory_bytes=sizes.pop, budget_bytes=300)
    for step in (1, 2, 9):  # the interval is too short to write the second step
        clock[0] += 3
        writer.update_step(step, 9, 50, loss=step / 2)
    assert sizes == []
    writer.set_phase("evaluate")
    last = read_status(tmp_path)
    assert last is not None
    assert (last.loss, last.memory_bytes, last.budget_bytes) == (4.5, 200, 300)


def test_status_without_newer_fields_is_read(tmp_path: Path) -> None:
    """A file without loss and memory is valid."""
    old = {"pid": 1, "host": "x", "started_at": "a", "updated_at": "b", "phase": "train", "step": 3, "total_steps": 9}
    (tmp_path / STATUS_FILE).write_text(json.dumps(old), encoding="utf-8")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.step, status.loss, status.memory_bytes, status.budget_bytes) == (3, None, None, None)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    """A disabled writer creates no file."""
    writer = StatusWriter(tmp_path, enabled=False)
    writer.set_phase("train")
    writer.update_step(1, 1, 1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_status_is_none(tmp_path: Path) -> None:
    """A missing, partial or invalid file gives None."""
    assert read_status(tmp_path) is None
    (tmp_path / STATUS_FILE).write_text('{"pid": ', encoding="utf-8")
    assert read_status(tmp_path) is None
    (tmp_path / STATUS_FILE).write_text("{}", encoding="utf-8")
    assert read_status(tmp_path) is None


def test_slurm_job_id_has_the_array_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The id has the format of squeue."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert get_slurm_job_id() is None
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    assert get_slurm_job_id() == "14"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert get_slurm_job_id() == "12_2"
