"""Where a run stands, as it tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftbench.run_dir.layout import STATUS_FILE
from peftbench.run_dir.status import StatusWriter, get_slurm_job_id, read_status


def test_it_tells_phases_at_once_and_steps_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens per second are those of the steps since the last time, and what is left is at this process's pace."""
    clock = [100.0]
    monkeypatch.setattr("peftbench.run_dir.status.time.monotonic", lambda: clock[0])
    teller = StatusWriter(tmp_path, enabled=True)
    teller.set_phase("train")
    assert (read_status(tmp_path) or pytest.fail("nothing told")).phase == "train"
    for step in range(11, 19):  # gone on with after ten, two seconds each
        clock[0] += 2
        teller.update_step(step, 30, 50, loss=step / 8)
    told = read_status(tmp_path)
    assert told is not None
    assert (told.step, told.total_steps) == (16, 30)
    assert told.tokens_per_second == pytest.approx(25)
    assert told.seconds_left == pytest.approx(2 * 14)
    assert (told.loss, told.memory_bytes, told.budget_bytes) == (2.0, None, None)
    clock[0] += 0.1
    teller.update_step(30, 30, 50, loss=1.5)
    assert (read_status(tmp_path) or told).step == 30


def test_steps_of_a_process_before(tmp_path: Path) -> None:
    """They are told with the next phase, though this process may make none."""
    teller = StatusWriter(tmp_path, enabled=True)
    teller.start_training(30, 30, loss=2.5)
    teller.set_phase("evaluate")
    told = read_status(tmp_path)
    assert told is not None
    assert (told.phase, told.step, told.total_steps, told.loss) == ("evaluate", 30, 30, 2.5)


def test_memory_is_asked_when_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for what is written, however many steps there were; a later phase keeps what the last step had."""
    clock = [100.0]
    monkeypatch.setattr("peftbench.run_dir.status.time.monotonic", lambda: clock[0])
    sizes = [200, 100]
    teller = StatusWriter(tmp_path, enabled=True)
    teller.start_training(0, 9, read_memory_bytes=sizes.pop, budget_bytes=300)
    for step in (1, 2, 9):  # the second comes too soon after the first to be told
        clock[0] += 3
        teller.update_step(step, 9, 50, loss=step / 2)
    assert sizes == []
    teller.set_phase("evaluate")
    last = read_status(tmp_path)
    assert last is not None
    assert (last.loss, last.memory_bytes, last.budget_bytes) == (4.5, 200, 300)


def test_a_file_of_before(tmp_path: Path) -> None:
    """What an earlier version wrote has no loss and no memory, and is read."""
    old = {"pid": 1, "host": "x", "started_at": "a", "updated_at": "b", "phase": "train", "step": 3, "total_steps": 9}
    (tmp_path / STATUS_FILE).write_text(json.dumps(old), encoding="utf-8")
    told = read_status(tmp_path)
    assert told is not None
    assert (told.step, told.loss, told.memory_bytes, told.budget_bytes) == (3, None, None, None)


def test_one_of_several_tells(tmp_path: Path) -> None:
    """The others write nothing."""
    teller = StatusWriter(tmp_path, enabled=False)
    teller.set_phase("train")
    teller.update_step(1, 1, 1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    """Half a file, or one of something else."""
    assert read_status(tmp_path) is None
    (tmp_path / STATUS_FILE).write_text('{"pid": ', encoding="utf-8")
    assert read_status(tmp_path) is None
    (tmp_path / STATUS_FILE).write_text("{}", encoding="utf-8")
    assert read_status(tmp_path) is None


def test_jobs_are_named_as_slurm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of an array has a name of its own."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert get_slurm_job_id() is None
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    assert get_slurm_job_id() == "14"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert get_slurm_job_id() == "12_2"
