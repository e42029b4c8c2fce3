"""The state of all runs in a folder, from their files and, if SLURM is installed, from its queue."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from peftbench.common.units import format_bytes, format_duration
from peftbench.errors import MissingFileError, RecordError
from peftbench.record import FINAL_OUTCOMES, RECORD_FILE, RunRecord, read_record
from peftbench.run_dir.layout import CHECKPOINTS_DIR, RECIPE_FILE, STATUS_FILE, RunDir
from peftbench.run_dir.lock import is_locked
from peftbench.run_dir.refusal import Refusal, read_refusal
from peftbench.run_dir.status import Status, read_status
from peftbench.slurm.job_file import JobFile, read_job_file
from peftbench.slurm.queue import QueuedJob

UNREADABLE_STATE = "unreadable"
"""State of a run whose record cannot be read."""


@dataclass(frozen=True)
class RunStatus:
    """The state of one run."""

    name: str
    state: str
    """waiting, running, finished, preempted, failed, refused, unreadable or gone."""
    step: int | None = None
    total_steps: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    job_id: str | None = None
    detail: str = ""
    """Explanation of the state."""
    loss: float | None = None
    """Loss of the last step, in nats."""
    memory_bytes: int | None = None
    """Memory of the main process after the last step, counted like the memory budget."""
    budget_bytes: int | None = None


def collect_run_statuses(
    folder: Path, queue: Mapping[str, QueuedJob], *, include_hosts: bool = True
) -> list[RunStatus]:
    """Return the state of every run in ``folder`` and its subfolders, sorted by path.

    ``queue`` has SLURM's jobs by id and may be empty. ``include_hosts`` adds host names to the details.

    Raises:
        MissingFileError: the folder has no run.
    """
    if not folder.is_dir():
        raise MissingFileError(f"folder {str(folder)!r} does not exist", "give the output folder of a run or a suite")
    run_dirs = sorted({path.parent for name in (RECIPE_FILE, RECORD_FILE, STATUS_FILE) for path in folder.rglob(name)})
    run_dirs = [run_dir for run_dir in run_dirs if CHECKPOINTS_DIR not in run_dir.relative_to(folder).parts]
    if not run_dirs:
        raise MissingFileError(f"no run in {folder}", "give the output folder of a run or a suite")
    return [
        _build_run_status(run_dir, str(run_dir.relative_to(folder)), queue, include_hosts=include_hosts)
        for run_dir in run_dirs
    ]


def find_unfinished_runs(folder: Path) -> list[RunStatus]:
    """Return the runs in ``folder`` without a readable record of their last attempt, with their states.

    The states come from files alone. Details have no host names, since a page with them may be shared.
    """
    try:
        rows = collect_run_statuses(folder, {}, include_hosts=False)
    except MissingFileError:
        return []
    unfinished_states = {"waiting", "running", "refused", "gone", UNREADABLE_STATE}
    return [
        row
        for row in rows
        if row.state in unfinished_states or (row.state == "failed" and not (folder / row.name / RECORD_FILE).exists())
    ]


def _build_run_status(run_dir: Path, name: str, queue: Mapping[str, QueuedJob], *, include_hosts: bool) -> RunStatus:
    status, job_file = read_status(run_dir), read_job_file(run_dir)
    job_id = job_file.job_id if job_file else None
    record, record_error = _load_record(run_dir)
    # The process may belong to an earlier job than the job file, or to none if it was started by hand.
    job_ids = (job_id, status.job_id if status else None)
    queued = next((job for key in job_ids if key and (job := queue.get(key))), None)
    on_other_host = status is not None and status.host != socket.gethostname()  # its lock may be invisible here
    if is_locked(run_dir) or (
        on_other_host and queued is not None and queued.state == "RUNNING" and _is_newer_than_record(status, record)
    ):
        return _build_running_status(name, status, job_id, include_hosts=include_hosts)
    will_run = queued is not None and queued.is_active and queued.state != "COMPLETING"
    if queued is not None and will_run and not (record and record.outcome.kind in FINAL_OUTCOMES):
        position = f"after step {record.outcome.step}, " if record is not None and record.outcome.step else ""
        reason = "starting" if queued.state == "RUNNING" else queued.state if queued.reason == "None" else queued.reason
        return RunStatus(name, "waiting", job_id=job_id, detail=f"{position}{reason.lower()}")
    if (refusal := read_refusal(run_dir) or _read_refusal_in_log(job_file, run_dir)) is not None:
        return RunStatus(name, refusal.state, job_id=job_id, detail=refusal.error)
    if record_error is not None:
        return RunStatus(name, UNREADABLE_STATE, job_id=job_id, detail=f"{record_error}; run it again")
    if record is not None and _is_record_current(status, record):
        return _build_ended_status(run_dir, name, record, status, job_id)
    return _build_status_without_record(run_dir, name, status, job_id, include_hosts=include_hosts)


def _build_status_without_record(
    run_dir: Path, name: str, status: Status | None, job_id: str | None, *, include_hosts: bool
) -> RunStatus:
    if status is None:
        detail = "" if job_id is None else f"job {job_id} is not in the queue"
        return RunStatus(name, "waiting", job_id=job_id, detail=detail)
    latest = RunDir(run_dir).find_latest_checkpoint_step()
    checkpoint = f"; checkpoint of step {latest}" if latest else ""
    host = f" on {status.host}" if include_hosts else ""
    return RunStatus(
        name,
        "gone",
        status.step,
        status.total_steps,
        job_id=job_id,
        detail=f"last update at {status.updated_at}{host}{checkpoint}; run it again to resume",
        loss=status.loss,
        memory_bytes=status.memory_bytes,
        budget_bytes=status.budget_bytes,
    )


def _load_record(run_dir: Path) -> tuple[RunRecord | None, str | None]:
    """Return the record of a run, or why it cannot be read; both are None if there is none."""
    path = run_dir / RECORD_FILE
    try:
        return read_record(path), None
    except RecordError as error:
        return None, str(error) if path.exists() else None


def _read_refusal_in_log(job_file: JobFile | None, run_dir: Path) -> Refusal | None:
    """Return the refusal in a job's log, for a folder that the job could not write; None if the run started."""
    result = None if job_file is None else job_file.read_final_result()
    if job_file is None or result is None or result["outcome"] != "refused" or job_file.log_path is None:
        return None
    log_time, files = Path(job_file.log_path).stat().st_mtime, [run_dir / RECORD_FILE, run_dir / STATUS_FILE]
    is_latest = all(log_time > path.stat().st_mtime for path in files if path.exists())
    return Refusal(error=str(result.get("error"))) if is_latest else None


def _build_running_status(name: str, status: Status | None, job_id: str | None, *, include_hosts: bool) -> RunStatus:
    if status is None:
        return RunStatus(name, "running", job_id=job_id, detail="starting")
    host = "" if not include_hosts or status.host == socket.gethostname() else f" on {status.host}"
    return RunStatus(
        name,
        "running",
        status.step,
        status.total_steps,
        status.tokens_per_second,
        status.seconds_left,
        status.job_id or job_id,
        f"{status.phase}{host}",
        status.loss,
        status.memory_bytes,
        status.budget_bytes,
    )


def _build_ended_status(
    run_dir: Path, name: str, record: RunRecord, status: Status | None, job_id: str | None
) -> RunStatus:
    outcome = record.outcome
    speed = record.throughput.tokens_per_second.real if record.throughput else None
    state = "finished" if outcome.kind in FINAL_OUTCOMES else outcome.kind
    detail = "" if outcome.kind == "ok" else (outcome.error or outcome.kind)
    if outcome.kind in {"oom", "diverged"}:
        detail = f"{outcome.kind}: {detail}"
    total_steps, step = status.total_steps if status else None, record.steps
    latest = RunDir(run_dir).find_latest_checkpoint_step()
    if state in {"preempted", "failed"} and latest is not None and latest > step:  # it ended before it could resume
        step, detail = latest, f"{detail}; checkpoint of step {latest}"
    return RunStatus(
        name,
        state,
        step,
        total_steps,
        speed,
        job_id=job_id,
        detail=(detail.splitlines() or [""])[0],
        loss=record.step_losses[-1] if record.step_losses and step == record.steps else None,
        memory_bytes=status.memory_bytes if status else None,
        budget_bytes=status.budget_bytes if status else None,
    )


def _get_written_at(record: RunRecord) -> str:
    """Return the start of the process that last wrote a record."""
    return max(record.started_at, record.evaluated_at or "")


def _is_newer_than_record(status: Status | None, record: RunRecord | None) -> bool:
    """True if the process started after the one that wrote the record."""
    return record is None or (status is not None and status.started_at > _get_written_at(record))


def _is_record_current(status: Status | None, record: RunRecord) -> bool:
    return status is None or _get_written_at(record) >= status.started_at


def render_status_table(rows: Sequence[RunStatus]) -> str:
    """Return a table with one row per run, without empty columns, and the number of runs per state."""
    lines = [
        [
            row.name,
            row.state,
            "–" if row.step is None else f"{row.step}/{row.total_steps if row.total_steps is not None else '?'}",
            "–" if row.loss is None else f"{row.loss:.3f}",
            "–" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "–" if row.memory_bytes is None else format_bytes(row.memory_bytes, row.budget_bytes),
            "–" if row.seconds_left is None else format_duration(row.seconds_left),
            row.job_id or "–",
            row.detail,
        ]
        for row in rows
    ]
    headers = ["run", "state", "step", "loss", "tokens/s", "memory", "time left", "job", ""]
    filled = [column for column in range(len(headers)) if any(line[column] not in {"–", ""} for line in lines)]
    headers, lines = [headers[column] for column in filled], [[line[column] for column in filled] for line in lines]
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{tabulate(lines, headers=headers, disable_numparse=True)}\n\n{len(rows)} runs: {counts}"
