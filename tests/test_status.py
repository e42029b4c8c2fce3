"""Where a run stands, as it tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.status import FILE, Teller, read_status, slurm_job


def test_it_tells_phases_at_once_and_steps_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens per second are those of the steps since the last time, and what is left is at this process's pace."""
    clock = [100.0]
    monkeypatch.setattr("peftbench.status.time.monotonic", lambda: clock[0])
    teller = Teller(tmp_path, tells=True)
    teller.phase("train")
    assert (read_status(tmp_path) or pytest.fail("nothing told")).phase == "train"
    for step in range(11, 19):  # gone on with after ten, two seconds each
        clock[0] += 2
        teller.step(step, 30, 50)
    told = read_status(tmp_path)
    assert told is not None
    assert (told.step, told.steps) == (16, 30)
    assert told.tokens_per_second == pytest.approx(25)
    assert told.seconds_left == pytest.approx(2 * 14)
    clock[0] += 0.1
    teller.step(30, 30, 50)
    assert (read_status(tmp_path) or told).step == 30


def test_steps_of_a_process_before(tmp_path: Path) -> None:
    """They are told with the next phase, though this process may make none."""
    teller = Teller(tmp_path, tells=True)
    teller.begin(30, 30)
    teller.phase("evaluate")
    told = read_status(tmp_path)
    assert told is not None
    assert (told.phase, told.step, told.steps) == ("evaluate", 30, 30)


def test_one_of_several_tells(tmp_path: Path) -> None:
    """The others write nothing."""
    teller = Teller(tmp_path, tells=False)
    teller.phase("train")
    teller.step(1, 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    """Half a file, or one of something else."""
    assert read_status(tmp_path) is None
    (tmp_path / FILE).write_text('{"pid": ', encoding="utf-8")
    assert read_status(tmp_path) is None
    (tmp_path / FILE).write_text("{}", encoding="utf-8")
    assert read_status(tmp_path) is None


def test_jobs_are_named_as_slurm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of an array has a name of its own."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    assert slurm_job() == "14"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_job() == "12_2"
