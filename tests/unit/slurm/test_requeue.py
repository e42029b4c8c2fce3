"""Requeueing of stopped jobs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from peftbench.errors import RecordError, SlurmError, TimeLimitError
from peftbench.record import EXIT_CODES, Outcome, RunRecord
from peftbench.run_dir.status import StatusWriter
from peftbench.slurm.job_file import JobFile, read_job_file
from peftbench.slurm.requeue import made_progress, main, requeue
from tests.helpers.records import minimal_record

LATER = "2999-01-01T00:00:00+00:00"


def record(
    kind: str = "preempted", step: int | None = 7, steps: int = 7, resumed_after: tuple[int, ...] = ()
) -> RunRecord:
    """Return the record of a run that ended with ``kind`` after ``steps`` steps."""
    outcome = Outcome(kind=kind, step=step)  # type: ignore[arg-type]
    changes = {"outcome": outcome, "steps": steps, "resumed_after": resumed_after, "started_at": LATER}
    return minimal_record().model_copy(update=changes)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake scontrol that writes its arguments to the returned file, in array task 12_3."""
    folder, arguments = tmp_path / "bin", tmp_path / "arguments"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{arguments}"\n', encoding="utf-8")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in (("SLURM_ARRAY_JOB_ID", "12"), ("SLURM_ARRAY_TASK_ID", "3"), ("SLURM_RESTART_COUNT", "2")):
        monkeypatch.setenv(name, value)
    StatusWriter(tmp_path, enabled=True).set_phase("train")
    return arguments


def test_run_with_progress_is_requeued(tmp_path: Path, scontrol: Path) -> None:
    """The job id is that of the array task."""
    record(resumed_after=(6,)).write(tmp_path)
    assert requeue(tmp_path, max_requeues=3) == EXIT_CODES["preempted"]
    assert scontrol.read_text(encoding="utf-8") == "requeue 12_3\n"


@pytest.mark.parametrize(
    "job_file", [None, JobFile(job_id="11_3", requeue_count=7), JobFile(job_id="12_3", log_path="a log")]
)
def test_requeues_are_counted_and_limited(job_file: JobFile | None, tmp_path: Path, scontrol: Path) -> None:
    """Requeues of this job count, with or without a job file; requeues of another job or by SLURM itself do not."""
    record().write(tmp_path)
    if job_file is not None:
        job_file.write(tmp_path)
    for number in (1, 2):
        requeue(tmp_path, max_requeues=2)
        current = read_job_file(tmp_path)
        assert current is not None
        assert (current.job_id, current.requeue_count) == ("12_3", number)
    with pytest.raises(SlurmError, match="job 12_3 was requeued 2 times, the limit; submit it again"):
        requeue(tmp_path, max_requeues=2)
    assert scontrol.read_text(encoding="utf-8") == "requeue 12_3\n" * 2


def test_killed_run_with_new_checkpoint_is_requeued(tmp_path: Path, scontrol: Path) -> None:
    """Without a record of this attempt, only a checkpoint written since its start counts as progress."""
    with pytest.raises(TimeLimitError, match="was killed after the stop request and saved no checkpoint"):
        requeue(tmp_path, 9)
    record().model_copy(update={"started_at": "2001-01-01T00:00:00+00:00"}).write(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "x" / "step-00000004" / "checkpoint.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    os.utime(checkpoint, (1, 1))
    with pytest.raises(TimeLimitError, match="saved no checkpoint"):
        requeue(tmp_path, 9)
    checkpoint.touch()
    os.utime(checkpoint, (time.time() + 5, time.time() + 5))
    assert requeue(tmp_path, 9) == EXIT_CODES["preempted"]
    assert scontrol.exists()


@pytest.mark.parametrize(
    ("run_record", "message"),
    [
        (record(resumed_after=(3, 7)), "made no progress from step 7"),
        (record(step=None, steps=0), "reached only its phase None"),
        (record(step=8), "made no progress"),  # killed in a step that was not saved
    ],
    ids=["no step", "before training", "not saved"],
)
def test_run_without_progress_is_not_requeued(
    run_record: RunRecord, message: str, tmp_path: Path, scontrol: Path
) -> None:
    """The error has the last step or phase."""
    run_record.write(tmp_path)
    with pytest.raises(TimeLimitError, match=message):
        requeue(tmp_path, 9)
    assert not scontrol.exists()


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"])
def test_stop_before_start_is_not_requeued(
    variable: str, tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of an earlier attempt or another job is not progress of this one."""
    record(resumed_after=(6,)).write(tmp_path)
    monkeypatch.setenv(variable, "3")
    with pytest.raises(TimeLimitError, match="the stop request came before the start of the run in"):
        requeue(tmp_path, max_requeues=9)
    assert not scontrol.exists()


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_ended_run_is_not_requeued(kind: str, tmp_path: Path, scontrol: Path) -> None:
    """The job's exit code is the run's."""
    if kind == "preempted":
        return
    record(kind).write(tmp_path)
    assert requeue(tmp_path, 9) == EXIT_CODES[kind]
    assert not scontrol.exists()


def test_unreadable_record_is_not_requeued(tmp_path: Path, scontrol: Path) -> None:
    """Without a known position the job could requeue itself forever."""
    (tmp_path / "record.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecordError):
        requeue(tmp_path, 9)
    assert not scontrol.exists()


@pytest.mark.parametrize("code", [0, 51, 70, 91])
def test_exit_code_of_an_ended_run_is_returned(code: int, tmp_path: Path, scontrol: Path) -> None:
    """A run that ended by itself after the stop request is not requeued, even if its outcome is preempted."""
    record().write(tmp_path)
    assert requeue(tmp_path, 9, code) == code
    assert not scontrol.exists()


def test_outside_slurm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a job there is nothing to requeue."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    record().write(tmp_path)
    with pytest.raises(SlurmError, match="run it again to resume"):
        requeue(tmp_path, 9)


@pytest.mark.parametrize("option", ["--max-requeues", "--at-most"])
def test_command_line_accepts_the_old_option(
    option: str, tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts of jobs that are still queued use --at-most."""
    record().write(tmp_path)
    for max_requeues, code in ((1, EXIT_CODES["preempted"]), (0, SlurmError.exit_code)):
        monkeypatch.setattr("sys.argv", ["requeue", option, str(max_requeues), str(tmp_path)])
        assert main() == code
    assert "requeued job 12_3 (requeue 1 of 1), resuming after step 7" in capsys.readouterr().out


def test_one_step_after_the_resume_step_is_progress() -> None:
    """A run without a completed step made no progress."""
    assert made_progress(record(step=1, steps=1))
    assert not made_progress(record(step=1, steps=1, resumed_after=(1,)))
