"""How runs stand, told from their files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from peftbench.errors import MissingFileError
from peftbench.record import Outcome, RunRecord
from peftbench.run_dir.lock import Lock
from peftbench.run_dir.status import Status, StatusWriter, read_status
from peftbench.slurm.job_file import JobFile
from peftbench.slurm.queue import QueuedJob
from peftbench.suite.status import RunStatus, collect_run_statuses, find_unfinished_runs, render_status_table
from tests.unit.record.test_run_record import record as a_record

EARLY, LATE = "2026-01-01T10:00:00+00:00", "2026-01-01T11:00:00+00:00"


def run(folder: Path, record: RunRecord | None = None, status: Status | None = None) -> Path:
    """A run's folder."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    if record is not None:
        record.write(folder)
    if status is not None:
        (folder / "status.json").write_text(status.model_dump_json(), encoding="utf-8")
    return folder


def told(started_at: str = EARLY, step: int = 5) -> Status:
    """A status as a process left it."""
    return Status(pid=1, host="node7", started_at=started_at, updated_at=started_at, phase="train", step=step, steps=9)


def ended(kind: str, error: str | None = None, started_at: str = EARLY) -> RunRecord:
    """A record of a run that ended so."""
    outcome = Outcome(kind=kind, step=5, error=error)  # type: ignore[arg-type]
    return a_record().model_copy(update={"outcome": outcome, "started_at": started_at, "steps": 5})


def one(folder: Path) -> RunStatus:
    """How the only run stands."""
    (found,) = collect_run_statuses(folder, {})
    return found


def test_every_state(tmp_path: Path) -> None:
    """Each from what its process left, or leaves."""
    run(tmp_path / "a_waiting")
    run(tmp_path / "b_finished", ended("ok"), told())
    run(tmp_path / "c_oom", ended("oom", "asked for too much"), told())
    run(tmp_path / "d_preempted", ended("preempted", "stopped by SIGUSR1; step 5 is kept"), told())
    run(tmp_path / "e_failed", ended("failed", "the disk is full\nmore"), told())
    gone = run(tmp_path / "f_gone", None, told())
    kept = gone / "checkpoints" / "x" / "step-00000004"
    kept.mkdir(parents=True)
    (kept / "checkpoint.json").touch()
    lock = Lock(run(tmp_path / "g_running", ended("preempted"), told(LATE, 7)))
    lock.acquire()
    early = run(tmp_path / "h_stopped_early", ended("preempted", "stopped by SIGTERM").model_copy(update={"steps": 0}))
    (early / "checkpoints" / "x" / "step-00000004").mkdir(parents=True)
    (early / "checkpoints" / "x" / "step-00000004" / "checkpoint.json").touch()
    found = {row.name[2:]: row for row in collect_run_statuses(tmp_path, {})}
    lock.release()
    assert {name: row.state for name, row in found.items()} == {
        "waiting": "waiting",
        "finished": "finished",
        "oom": "finished",
        "preempted": "preempted",
        "failed": "failed",
        "gone": "gone",
        "running": "running",
        "stopped_early": "preempted",
    }
    assert found["oom"].detail == "oom: asked for too much"
    assert found["preempted"].detail == "stopped by SIGUSR1; step 5 is kept"
    assert (found["stopped_early"].step, found["stopped_early"].detail) == (4, "stopped by SIGTERM; step 4 is kept")
    assert found["failed"].detail == "the disk is full"
    assert "on node7; step 4 is kept; run it again to go on" in found["gone"].detail
    assert (found["running"].step, found["running"].total_steps) == (7, 9)
    text = render_status_table(collect_run_statuses(tmp_path, {}))
    assert "8 runs: " in text
    assert "2 finished" in text


def test_a_page_names_no_machine(tmp_path: Path) -> None:
    """What may be shared says when a run was last seen, and not where."""
    run(tmp_path / "a_gone", None, told())
    lock = Lock(run(tmp_path / "b_running", None, told()))
    lock.acquire()
    found = find_unfinished_runs(tmp_path)
    lock.release()
    assert [row.detail for row in found] == [f"last seen at {EARLY}; run it again to go on", "train"]


def test_the_table(tmp_path: Path) -> None:
    """Loss and memory in short, beside what was there; what is known of no run has no column."""
    news = {"loss": 2.3456, "memory_bytes": 96 * 2**20, "budget_bytes": 112 * 2**20, "tokens_per_second": 18204.4}
    lock = Lock(run(tmp_path / "a", None, told().model_copy(update=news | {"seconds_left": 41.0})))
    lock.acquire()
    run(tmp_path / "b", ended("preempted", "stopped").model_copy(update={"losses": (3.0, 2.5), "throughput": None}))
    rows = collect_run_statuses(tmp_path, {})
    lock.release()
    assert render_status_table(rows).splitlines()[:4] == [
        "run    state      step    loss    tokens/s    memory         left",
        "-----  ---------  ------  ------  ----------  -------------  -------  --------------",
        "a      running    5/9     2.346   18,204      96 of 112 MiB  0:00:41  train on node7",
        "b      preempted  5/?     2.500   –           –              –        stopped",
    ]
    assert (rows[0].loss, rows[0].memory_bytes, rows[0].budget_bytes) == (2.3456, 96 * 2**20, 112 * 2**20)


def test_what_was_gone_on_with_and_died(tmp_path: Path) -> None:
    """A record of an earlier attempt does not hide that the later one is gone."""
    run(tmp_path / "x", ended("preempted"), told(LATE))
    assert one(tmp_path).state == "gone"


@pytest.mark.parametrize(
    ("queue", "state", "said"),
    [
        ({"12_3": QueuedJob("PENDING", "Resources")}, "waiting", "after step 5, resources"),
        ({"12_3": QueuedJob("REQUEUED", "None")}, "waiting", "after step 5, requeued"),
        ({"12_3": QueuedJob("RUNNING", "None")}, "running", "train on node7"),
        ({"12_4": QueuedJob("RUNNING", "None")}, "preempted", "stopped"),
        ({"12_3": QueuedJob("COMPLETING", "None")}, "preempted", "stopped"),
        ({"13": QueuedJob("PENDING", "Priority")}, "waiting", "after step 5, priority"),
    ],
)
def test_the_queue_knows_more(queue: dict[str, QueuedJob], state: str, said: str, tmp_path: Path) -> None:
    """A run on another machine, whose lock cannot be seen here, and one that is to begin anew."""
    started = LATE if state == "running" else EARLY
    folder = run(tmp_path / "x", ended("preempted", "stopped"), told(started))
    job = next(iter(queue)) if "13" in queue else "12_3"  # 13 is what it was submitted as after it had stopped
    (folder / "job.json").write_text(json.dumps({"job": job}), encoding="utf-8")
    (found,) = collect_run_statuses(tmp_path, queue)
    assert (found.state, found.detail) == (state, said)


def test_a_run_that_was_refused(tmp_path: Path) -> None:
    """It leaves nothing but what its job's log says; a record that came later says more."""
    log = tmp_path / "12.log"
    folder = run(tmp_path / "x")
    JobFile(job_id="12", log_path=str(log)).write(folder)
    assert one(tmp_path).state == "waiting"
    log.write_text('error: no\n{"outcome": "refused", "error": "there is no file rows.jsonl"}\nsrun: error\n')
    assert (one(tmp_path).state, one(tmp_path).detail) == ("failed", "there is no file rows.jsonl")
    os.utime(log, (1, 1))
    ended("ok").write(folder)
    assert one(tmp_path).state == "finished"


def test_a_page_has_a_run_that_was_refused(tmp_path: Path) -> None:
    """One that left no record is listed with the reason; one with a record is on the page by that already."""
    log = tmp_path / "12.log"
    JobFile(job_id="12", log_path=str(log)).write(run(tmp_path / "x"))
    run(tmp_path / "y", ended("failed", "the disk is full"))
    log.write_text('{"outcome": "refused", "error": "there is no file rows.jsonl"}\n')
    assert [(row.name, row.detail) for row in find_unfinished_runs(tmp_path)] == [("x", "there is no file rows.jsonl")]


def test_a_page_has_a_run_that_goes_on(tmp_path: Path) -> None:
    """A record of an attempt before does not hide that it runs."""
    lock = Lock(run(tmp_path / "x", ended("preempted"), told(LATE)))
    lock.acquire()
    found = find_unfinished_runs(tmp_path)
    lock.release()
    assert [row.state for row in found] == ["running"]


def test_folders_are_called_as_one_likes(tmp_path: Path) -> None:
    """A run may be called model, and lie below a folder called checkpoints."""
    run(tmp_path / "checkpoints" / "model", ended("ok"))
    assert one(tmp_path / "checkpoints").name == "model"


def test_a_folder_without_runs(tmp_path: Path) -> None:
    """It is no error of the program."""
    with pytest.raises(MissingFileError, match="there is no run below"):
        collect_run_statuses(tmp_path, {})


def test_a_teller_is_read(tmp_path: Path) -> None:
    """What one process tells another reads."""
    folder = run(tmp_path / "x")
    StatusWriter(folder, enabled=True).set_phase("load")
    assert read_status(folder) is not None
    assert one(tmp_path).state == "gone"  # for nobody holds the folder
