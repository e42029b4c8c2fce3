"""Whether a job that was stopped begins anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftbench.errors import RecordError, SlurmError, TimeLimitError
from peftbench.record import EXIT_CODES, Outcome, RunRecord
from peftbench.slurm.requeue import gained, requeue
from peftbench.status import Teller
from tests.test_record import record as a_record


def record(kind: str = "preempted", step: int | None = 7, steps: int = 7, began: tuple[int, ...] = ()) -> RunRecord:
    """Of a run that ended so, after so many steps."""
    outcome = Outcome(kind=kind, step=step)  # type: ignore[arg-type]
    return a_record().model_copy(update={"outcome": outcome, "steps": steps, "resumed_after": began})


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
    Teller(tmp_path, tells=True).phase("train")
    return told


def test_what_came_further_begins_anew(tmp_path: Path, scontrol: Path) -> None:
    """As the task of the array that it is."""
    record(began=(6,)).write(tmp_path)
    assert requeue(tmp_path, at_most=3) == EXIT_CODES["preempted"]
    assert scontrol.read_text(encoding="utf-8") == "requeue 12_3\n"


@pytest.mark.parametrize(
    ("made", "at_most", "error", "said"),
    [
        (record(), 2, SlurmError, "begun anew 2 times, which is as often as it may be"),
        (record(began=(3, 7)), 9, TimeLimitError, "began at step 7 and came no further"),
        (record(step=None, steps=0), 9, TimeLimitError, "came no further than its phase None"),
        (record(step=8), 9, TimeLimitError, "came no further"),  # broken off in a step that nobody kept
    ],
    ids=["too often", "no step", "not even begun", "not kept"],
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
        requeue(tmp_path, at_most=9)
    assert not scontrol.exists()


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_what_has_ended_is_left(kind: str, tmp_path: Path, scontrol: Path) -> None:
    """A result is one whatever it is; a fault makes the job one that failed."""
    if kind == "preempted":
        return
    record(kind).write(tmp_path)
    assert requeue(tmp_path, 9) == (0 if kind in {"ok", "oom", "diverged"} else EXIT_CODES[kind])
    assert not scontrol.exists()


def test_no_record_no_requeue(tmp_path: Path, scontrol: Path) -> None:
    """What left nothing is not tried for ever."""
    with pytest.raises(RecordError):
        requeue(tmp_path, 9)
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
    assert gained(record(step=1, steps=1))
    assert not gained(record(step=1, steps=1, began=(1,)))
