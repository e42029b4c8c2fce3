"""States of runs, from their files and from SLURM's queue."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from peftbench.errors import MissingFileError
from peftbench.record import Outcome, RunRecord
from peftbench.run_dir.lock import Lock
from peftbench.run_dir.refusal import Refusal, write_refusal
from peftbench.run_dir.status import Status, StatusWriter, read_status
from peftbench.slurm.job_file import JobFile
from peftbench.slurm.queue import QueuedJob
from peftbench.suite.status import RunStatus, collect_run_statuses, find_unfinished_runs, render_status_table
from tests.helpers.records import damage_records, minimal_record

EARLY, LATE = "2026-01-01T10:00:00+00:00", "2026-01-01T11:00:00+00:00"


def make_run(folder: Path, record: RunRecord | None = None, status: Status | None = None) -> Path:
    """Create a run's folder and return it."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    if record is not None:
        record.write(folder)
    if status is not None:
        (folder / "status.json").write_text(status.model_dump_json(), encoding="utf-8")
    return folder


def status_at(started_at: str = EARLY, step: int = 5) -> Status:
    """Return the status of a process on another host."""
    return Status(
        pid=1, host="node7", started_at=started_at, updated_at=started_at, phase="train", step=step, total_steps=9
    )


def record_of(kind: str, error: str | None = None, started_at: str = EARLY) -> RunRecord:
    """Return the record of a run with outcome ``kind`` after five steps."""
    outcome = Outcome(kind=kind, step=5, error=error)  # type: ignore[arg-type]
    return minimal_record().model_copy(update={"outcome": outcome, "started_at": started_at, "steps": 5})


def get_status(folder: Path) -> RunStatus:
    """Return the state of the only run in ``folder``."""
    (row,) = collect_run_statuses(folder, {})
    return row


def test_state_of_every_kind_of_run(tmp_path: Path) -> None:
    """Each state follows from the record, the status file, the lock and the checkpoints."""
    make_run(tmp_path / "a_waiting")
    make_run(tmp_path / "b_finished", record_of("ok"), status_at())
    make_run(tmp_path / "c_oom", record_of("oom", "asked for too much"), status_at())
    make_run(tmp_path / "d_preempted", record_of("preempted", "stopped by SIGUSR1"), status_at())
    make_run(tmp_path / "e_failed", record_of("failed", "the disk is full\nmore"), status_at())
    gone = make_run(tmp_path / "f_gone", None, status_at())
    checkpoint = gone / "checkpoints" / "x" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    lock = Lock(make_run(tmp_path / "g_running", record_of("preempted"), status_at(LATE, 7)))
    lock.acquire()
    early = make_run(
        tmp_path / "h_stopped_early", record_of("preempted", "stopped by SIGTERM").model_copy(update={"steps": 0})
    )
    (early / "checkpoints" / "x" / "step-00000004").mkdir(parents=True)
    (early / "checkpoints" / "x" / "step-00000004" / "checkpoint.json").touch()
    rows = {row.name[2:]: row for row in collect_run_statuses(tmp_path, {})}
    lock.release()
    assert {name: row.state for name, row in rows.items()} == {
        "waiting": "waiting",
        "finished": "finished",
        "oom": "finished",
        "preempted": "preempted",
        "failed": "failed",
        "gone": "gone",
        "running": "running",
        "stopped_early": "preempted",
    }
    assert rows["oom"].detail == "oom: asked for too much"
    assert rows["preempted"].detail == "stopped by SIGUSR1"
    assert (rows["stopped_early"].step, rows["stopped_early"].detail) == (4, "stopped by SIGTERM; checkpoint of step 4")
    assert rows["failed"].detail == "the disk is full"
    assert "on node7; checkpoint of step 4; run it again to resume" in rows["gone"].detail
    assert (rows["running"].step, rows["running"].total_steps) == (7, 9)
    text = render_status_table(collect_run_statuses(tmp_path, {}))
    assert "8 runs: " in text
    assert "2 finished" in text


def test_unfinished_runs_have_no_host_names(tmp_path: Path) -> None:
    """Report pages are shared, so details have times but no hosts."""
    make_run(tmp_path / "a_gone", None, status_at())
    lock = Lock(make_run(tmp_path / "b_running", None, status_at()))
    lock.acquire()
    rows = find_unfinished_runs(tmp_path)
    lock.release()
    assert [row.detail for row in rows] == [f"last update at {EARLY}; run it again to resume", "train"]


def test_table_has_loss_and_memory_without_empty_columns(tmp_path: Path) -> None:
    """Columns without a value in any row are left out."""
    measured = {"loss": 2.3456, "memory_bytes": 96 * 2**20, "budget_bytes": 112 * 2**20, "tokens_per_second": 18204.4}
    lock = Lock(make_run(tmp_path / "a", None, status_at().model_copy(update=measured | {"seconds_left": 41.0})))
    lock.acquire()
    make_run(
        tmp_path / "b",
        record_of("preempted", "stopped").model_copy(update={"step_losses": (3.0, 2.5), "throughput": None}),
    )
    rows = collect_run_statuses(tmp_path, {})
    lock.release()
    assert render_status_table(rows).splitlines()[:4] == [
        "run    state      step    loss    tokens/s    memory         time left",
        "-----  ---------  ------  ------  ----------  -------------  -----------  --------------",
        "a      running    5/9     2.346   18,204      96 of 112 MiB  0:00:41      train on node7",
        "b      preempted  5/?     2.500   –           –              –            stopped",
    ]
    assert (rows[0].loss, rows[0].memory_bytes, rows[0].budget_bytes) == (2.3456, 96 * 2**20, 112 * 2**20)


def test_status_newer_than_the_record_is_gone(tmp_path: Path) -> None:
    """The record is that of an earlier attempt, and the process of the later attempt has ended."""
    make_run(tmp_path / "x", record_of("preempted"), status_at(LATE))
    assert get_status(tmp_path).state == "gone"


@pytest.mark.parametrize(
    ("queue", "state", "detail"),
    [
        ({"12_3": QueuedJob("PENDING", "Resources")}, "waiting", "after step 5, resources"),
        ({"12_3": QueuedJob("REQUEUED", "None")}, "waiting", "after step 5, requeued"),
        ({"12_3": QueuedJob("RUNNING", "None")}, "running", "train on node7"),
        ({"12_4": QueuedJob("RUNNING", "None")}, "preempted", "stopped"),
        ({"12_3": QueuedJob("COMPLETING", "None")}, "preempted", "stopped"),
        ({"13": QueuedJob("PENDING", "Priority")}, "waiting", "after step 5, priority"),
    ],
)
def test_queue_adds_states(queue: dict[str, QueuedJob], state: str, detail: str, tmp_path: Path) -> None:
    """The queue adds runs on other hosts, whose locks may be invisible, and requeued runs."""
    started = LATE if state == "running" else EARLY
    folder = make_run(tmp_path / "x", record_of("preempted", "stopped"), status_at(started))
    job = next(iter(queue)) if "13" in queue else "12_3"  # 13 is a new submission after the stop
    (folder / "job.json").write_text(json.dumps({"job_id": job}), encoding="utf-8")
    (row,) = collect_run_statuses(tmp_path, queue)
    assert (row.state, row.detail) == (state, detail)


def test_refusal_in_the_log_of_a_job_is_read(tmp_path: Path) -> None:
    """A job that cannot write to the run's folder leaves the error in its log; a later record replaces it."""
    log = tmp_path / "12.log"
    folder = make_run(tmp_path / "x")
    JobFile(job_id="12", log_path=str(log)).write(folder)
    assert get_status(tmp_path).state == "waiting"
    log.write_text('error: no\n{"outcome": "refused", "error": "there is no file rows.jsonl"}\nsrun: error\n')
    assert (get_status(tmp_path).state, get_status(tmp_path).detail) == ("refused", "there is no file rows.jsonl")
    os.utime(log, (1, 1))
    record_of("ok").write(folder)
    assert get_status(tmp_path).state == "finished"


def test_unfinished_runs_include_refused_ones(tmp_path: Path) -> None:
    """A failed run without a record is listed with its error; one with a record is not."""
    log = tmp_path / "12.log"
    JobFile(job_id="12", log_path=str(log)).write(make_run(tmp_path / "x"))
    make_run(tmp_path / "y", record_of("failed", "the disk is full"))
    log.write_text('{"outcome": "refused", "error": "there is no file rows.jsonl"}\n')
    assert [(row.name, row.detail) for row in find_unfinished_runs(tmp_path)] == [("x", "there is no file rows.jsonl")]


@pytest.mark.parametrize(("outcome", "state"), [("refused", "refused"), ("crashed", "failed")])
def test_refusal_is_a_state(outcome: str, state: str, tmp_path: Path) -> None:
    """It has the reason, whatever an earlier attempt left; a running or queued attempt replaces it."""
    refusal = Refusal(outcome=outcome, error="no folder nowhere")  # type: ignore[arg-type]
    for number, (record, status) in enumerate([(None, None), (record_of("ok"), None), (None, status_at())]):
        write_refusal(make_run(tmp_path / f"x{number}", record, status), refusal)
    rows = collect_run_statuses(tmp_path, {})
    assert [(row.state, row.detail) for row in rows] == [(state, "no folder nowhere")] * 3
    listed = [(row.name, row.state) for row in find_unfinished_runs(tmp_path)]
    assert listed == [(f"x{number}", state) for number in range(3) if state == "refused" or number != 1]
    assert state in render_status_table(rows)
    lock = Lock(tmp_path / "x1")
    lock.acquire()
    assert collect_run_statuses(tmp_path, {})[1].state == "running"
    lock.release()
    (tmp_path / "x0" / "job.json").write_text(json.dumps({"job_id": "7"}), encoding="utf-8")
    assert collect_run_statuses(tmp_path, {"7": QueuedJob("PENDING", "Priority")})[0].state == "waiting"


def test_damaged_record_is_unreadable(tmp_path: Path) -> None:
    """Its row has the path and the reason; a run that works on it, or one that was refused, has its own state."""
    reasons = damage_records(tmp_path)
    rows = {row.name: row for row in collect_run_statuses(tmp_path, {})}
    assert {row.state for row in rows.values()} == {"unreadable"}
    for name, reason in reasons.items():
        assert reason in rows[name].detail
        assert str(tmp_path / name / "record.json") in rows[name].detail
    assert [row.state for row in find_unfinished_runs(tmp_path)] == ["unreadable"] * len(reasons)
    lock = Lock(tmp_path / "truncated")
    lock.acquire()
    (tmp_path / "text" / "recipe.yaml").touch()
    write_refusal(tmp_path / "text", Refusal(error="no"))
    states = {row.name: row.state for row in collect_run_statuses(tmp_path, {})}
    lock.release()
    assert (states["truncated"], states["text"], states["empty"]) == ("running", "refused", "unreadable")


def test_unreadable_refusal_is_ignored(tmp_path: Path) -> None:
    """A damaged file does not end the command."""
    folder = make_run(tmp_path / "x")
    for text in ("", "[]", '{"outcome": "refused"}', "{"):
        (folder / "refusal.json").write_text(text, encoding="utf-8")
        assert get_status(tmp_path).state == "waiting"


def test_unfinished_runs_include_a_resumed_one(tmp_path: Path) -> None:
    """A run with a record of an earlier attempt is listed as running."""
    lock = Lock(make_run(tmp_path / "x", record_of("preempted"), status_at(LATE)))
    lock.acquire()
    rows = find_unfinished_runs(tmp_path)
    lock.release()
    assert [row.state for row in rows] == ["running"]


def test_run_may_have_the_name_of_a_subfolder(tmp_path: Path) -> None:
    """A run named model in a folder named checkpoints is listed."""
    make_run(tmp_path / "checkpoints" / "model", record_of("ok"))
    assert get_status(tmp_path / "checkpoints").name == "model"


def test_folder_without_runs_is_refused(tmp_path: Path) -> None:
    """The error is a MissingFileError, which commands print without a traceback."""
    with pytest.raises(MissingFileError, match="no run in"):
        collect_run_statuses(tmp_path, {})


def test_status_without_a_lock_is_gone(tmp_path: Path) -> None:
    """The process that wrote the status has ended."""
    folder = make_run(tmp_path / "x")
    StatusWriter(folder, enabled=True).set_phase("load")
    assert read_status(folder) is not None
    assert get_status(tmp_path).state == "gone"
