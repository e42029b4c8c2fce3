"""Whether a job that was stopped begins anew."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from peftbench.errors import RecordError, SlurmError, TimeLimitError
from peftbench.record import EXIT_CODES, Outcome, RunRecord
from peftbench.run_dir.status import StatusWriter
from peftbench.slurm.job_file import JobFile, read_job_file
from peftbench.slurm.requeue import made_progress, requeue
from tests.unit.record.test_run_record import record as a_record

LATER = "2999-01-01T00:00:00+00:00"


def record(kind: str = "preempted", step: int | None = 7, steps: int = 7, began: tuple[int, ...] = ()) -> RunRecord:
    """Of a run that ended so, after so many steps."""
    outcome = Outcome(kind=kind, step=step)  # type: ignore[arg-type]
    changes = {"outcome": outcome, "steps": steps, "resumed_after": began, "started_at": LATER}
    return a_record().model_copy(update=changes)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that writes down what it is told; in job 12, task 3."""
    folder, told = tmp_path / "bin", tmp_path / "told"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{told}"\n', encoding="utf-8")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in (("SLURM_ARRAY_JOB_ID", "12"), ("SLURM_ARRAY_TASK_ID", "3"), ("SLURM_RESTART_COUNT", "2")):
        monkeypatch.setenv(name, value)
    StatusWriter(tmp_path, enabled=True).set_phase("train")
    return told


def test_what_came_further_begins_anew(tmp_path: Path, scontrol: Path) -> None:
    """As the task of the array that it is."""
    record(began=(6,)).write(tmp_path)
    assert requeue(tmp_path, max_requeues=3) == EXIT_CODES["preempted"]
    assert scontrol.read_text(encoding="utf-8") == "requeue 12_3\n"


@pytest.mark.parametrize("before", [None, JobFile(job_id="11_3", requeued=7), JobFile(job_id="12_3", log_path="a log")])
def test_it_is_counted(before: JobFile | None, tmp_path: Path, scontrol: Path) -> None:
    """Of this job, handed in by one command or by hand; what SLURM itself began anew is not counted."""
    record().write(tmp_path)
    if before is not None:
        before.write(tmp_path)
    for number in (1, 2):
        requeue(tmp_path, max_requeues=2)
        found = read_job_file(tmp_path)
        assert found is not None
        assert (found.job_id, found.requeue_count) == ("12_3", number)
    with pytest.raises(SlurmError, match="begun itself anew 2 times, which is as often as it may"):
        requeue(tmp_path, max_requeues=2)
    assert scontrol.read_text(encoding="utf-8") == "requeue 12_3\n" * 2


def test_it_was_killed_after_it_had_kept_a_step(tmp_path: Path, scontrol: Path) -> None:
    """There is no record of this attempt, or one of an attempt before; what was kept since is what was gained."""
    with pytest.raises(TimeLimitError, match="was killed after it had been told to stop, and kept nothing"):
        requeue(tmp_path, 9)
    record().model_copy(update={"started_at": "2001-01-01T00:00:00+00:00"}).write(tmp_path)
    kept = tmp_path / "checkpoints" / "x" / "step-00000004" / "checkpoint.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    os.utime(kept, (1, 1))
    with pytest.raises(TimeLimitError, match="kept nothing"):
        requeue(tmp_path, 9)
    kept.touch()
    os.utime(kept, (time.time() + 5, time.time() + 5))
    assert requeue(tmp_path, 9) == EXIT_CODES["preempted"]
    assert scontrol.exists()


@pytest.mark.parametrize(
    ("made", "at_most", "error", "said"),
    [
        (record(began=(3, 7)), 9, TimeLimitError, "began at step 7 and came no further"),
        (record(step=None, steps=0), 9, TimeLimitError, "came no further than its phase None"),
        (record(step=8), 9, TimeLimitError, "came no further"),  # broken off in a step that nobody kept
    ],
    ids=["no step", "not even begun", "not kept"],
)
def test_what_would_lead_nowhere(  # noqa: PLR0917
    made: RunRecord, at_most: int, error: type[SlurmError], said: str, tmp_path: Path, scontrol: Path
) -> None:
    """It is not asked for, and the log says why."""
    made.write(tmp_path)
    with pytest.raises(error, match=said):
        requeue(tmp_path, at_most)
    assert not scontrol.exists()


@pytest.mark.parametrize("before", ["SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"])
def test_stopped_before_it_began(before: str, tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is of an attempt before, or of another job, and is nothing that this one has gained."""
    record(began=(6,)).write(tmp_path)
    monkeypatch.setenv(before, "3")
    with pytest.raises(TimeLimitError, match=r"told to stop before the run in .* had begun"):
        requeue(tmp_path, max_requeues=9)
    assert not scontrol.exists()


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_what_has_ended_is_left(kind: str, tmp_path: Path, scontrol: Path) -> None:
    """A result is one whatever it is; a fault makes the job one that failed."""
    if kind == "preempted":
        return
    record(kind).write(tmp_path)
    assert requeue(tmp_path, 9) == EXIT_CODES[kind]
    assert not scontrol.exists()


def test_a_record_that_cannot_be_read(tmp_path: Path, scontrol: Path) -> None:
    """What nobody knows is not tried for ever."""
    (tmp_path / "record.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecordError):
        requeue(tmp_path, 9)
    assert not scontrol.exists()


@pytest.mark.parametrize("code", [0, 51, 70, 91])
def test_it_came_to_an_end_of_its_own(code: int, tmp_path: Path, scontrol: Path) -> None:
    """Refused, or with its result, while it was told to stop: whatever lies there, its job ends as it did."""
    record().write(tmp_path)
    assert requeue(tmp_path, 9, code) == code
    assert not scontrol.exists()


def test_outside_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to begin anew."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    record().write(tmp_path)
    with pytest.raises(SlurmError, match="run it again to go on"):
        requeue(tmp_path, 9)


def test_gained() -> None:
    """A step more than there was is enough."""
    assert made_progress(record(step=1, steps=1))
    assert not made_progress(record(step=1, steps=1, began=(1,)))
