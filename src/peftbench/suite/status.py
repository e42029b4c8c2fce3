"""How the runs below a folder stand, from their files alone; and from SLURM's queue, where there is one."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from peftbench.common.units import format_bytes
from peftbench.errors import MissingFileError, RecordError
from peftbench.record import FINAL_OUTCOMES, RECORD_FILE, RunRecord, read_record
from peftbench.run_dir.layout import CHECKPOINTS_DIR, RECIPE_FILE, RunDir
from peftbench.run_dir.layout import STATUS_FILE as STATUS
from peftbench.run_dir.lock import is_locked
from peftbench.run_dir.status import Status, read_status
from peftbench.slurm.job_file import JobFile, read_job_file
from peftbench.slurm.queue import QueuedJob


@dataclass(frozen=True)
class RunStatus:
    """Of one run."""

    name: str
    state: str
    """waiting, running, finished, preempted, failed or gone."""
    step: int | None = None
    total_steps: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    job_id: str | None = None
    detail: str = ""
    """What explains the state."""
    loss: float | None = None
    """Of the last step, in nats."""
    memory_bytes: int | None = None
    """What its main process held after the last step, as its budget counts it."""
    budget_bytes: int | None = None


def collect_run_statuses(
    folder: Path, queue: Mapping[str, QueuedJob], *, include_hosts: bool = True
) -> list[RunStatus]:
    """Every run below ``folder``, by path; ``queue`` is what SLURM says, and may be empty.

    Without ``hosts`` no machine is named.

    Raises:
        MissingFileError: there is none.
    """
    places = sorted({path.parent for name in (RECIPE_FILE, RECORD_FILE, STATUS) for path in folder.rglob(name)})
    places = [place for place in places if CHECKPOINTS_DIR not in place.relative_to(folder).parts]
    if not places:
        raise MissingFileError(f"there is no run below {folder}", "give the folder that a suite wrote to")
    return [
        _build_run_status(place, str(place.relative_to(folder)), queue, include_hosts=include_hosts) for place in places
    ]


def find_unfinished_runs(folder: Path) -> list[RunStatus]:
    """Runs below ``folder`` of which a page would not tell how they stand, by their files alone.

    They wait, run or are gone, with an older record or with none; or they were refused and have none. The page may be
    shared: no machine is named.
    """
    try:
        found = collect_run_statuses(folder, {}, include_hosts=False)
    except MissingFileError:
        return []
    open_ones = {"waiting", "running", "gone"}
    return [
        one
        for one in found
        if one.state in open_ones or (one.state == "failed" and not (folder / one.name / RECORD_FILE).exists())
    ]


def _build_run_status(run_dir: Path, name: str, queue: Mapping[str, QueuedJob], *, include_hosts: bool) -> RunStatus:
    status, before = read_status(run_dir), read_job_file(run_dir)
    job = before.job_id if before else None
    record = None
    with suppress(RecordError):
        record = read_record(run_dir / RECORD_FILE)
    # A process may have been started by hand, or be of the job before.
    asked = next((found for key in (job, status.job_id if status else None) if key and (found := queue.get(key))), None)
    elsewhere = status is not None and status.host != socket.gethostname()  # where a lock may not be seen from here
    if is_locked(run_dir) or (
        elsewhere and asked is not None and asked.state == "RUNNING" and _is_newer_than_record(status, record)
    ):
        return _build_running_status(name, status, job, include_hosts=include_hosts)
    lasts = asked is not None and asked.is_active and asked.state != "COMPLETING"
    if asked is not None and lasts and not (record and record.outcome.kind in FINAL_OUTCOMES):
        after = f"after step {record.outcome.step}, " if record is not None and record.outcome.step else ""
        why = "starting" if asked.state == "RUNNING" else asked.state if asked.reason == "None" else asked.reason
        return RunStatus(name, "waiting", job_id=job, detail=f"{after}{why.lower()}")
    if before is not None and (refused := _find_refusal(before, run_dir)):
        return RunStatus(name, "failed", job_id=job, detail=refused)
    if record is not None and _is_record_current(status, record):
        return _build_ended_status(run_dir, name, record, status, job)
    if status is not None:
        kept = f"; step {newest} is kept" if (newest := RunDir(run_dir).find_latest_checkpoint_step()) else ""
        where = f" on {status.host}" if include_hosts else ""
        return RunStatus(
            name,
            "gone",
            status.step,
            status.total_steps,
            job_id=job,
            detail=f"last seen at {status.updated_at}{where}{kept}; run it again to go on",
            loss=status.loss,
            memory_bytes=status.memory_bytes,
            budget_bytes=status.budget_bytes,
        )
    return RunStatus(name, "waiting", job_id=job, detail="" if job is None else f"job {job} is not in the queue")


def _find_refusal(job_file: JobFile, run_dir: Path) -> str | None:
    """Why a job's run was refused, of which its log alone has word."""
    said = job_file.read_final_result()
    if said is None or said["outcome"] != "refused" or job_file.log_path is None:
        return None
    told, others = Path(job_file.log_path).stat().st_mtime, [run_dir / RECORD_FILE, run_dir / STATUS]
    later = all(told > path.stat().st_mtime for path in others if path.exists())
    return str(said.get("error")) if later else None


def _build_running_status(name: str, status: Status | None, job_id: str | None, *, include_hosts: bool) -> RunStatus:
    if status is None:
        return RunStatus(name, "running", job_id=job_id, detail="starting")
    here = "" if not include_hosts or status.host == socket.gethostname() else f" on {status.host}"
    return RunStatus(
        name,
        "running",
        status.step,
        status.total_steps,
        status.tokens_per_second,
        status.seconds_left,
        status.job_id or job_id,
        f"{status.phase}{here}",
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
    said = "" if outcome.kind == "ok" else (outcome.error or outcome.kind)
    if outcome.kind in {"oom", "diverged"}:
        said = f"{outcome.kind}: {said}"
    steps, step = status.total_steps if status else None, record.steps
    kept = RunDir(run_dir).find_latest_checkpoint_step()
    if state in {"preempted", "failed"} and kept is not None and kept > step:  # it ended before it had taken that up
        step, said = kept, f"{said}; step {kept} is kept"
    return RunStatus(
        name,
        state,
        step,
        steps,
        speed,
        job_id=job_id,
        detail=(said.splitlines() or [""])[0],
        loss=record.step_losses[-1] if record.step_losses and step == record.steps else None,
        memory_bytes=status.memory_bytes if status else None,
        budget_bytes=status.budget_bytes if status else None,
    )


def _is_newer_than_record(status: Status | None, record: RunRecord | None) -> bool:
    """Whether a process began after the one that wrote the record."""
    return record is None or (status is not None and status.started_at > record.started_at)


def _is_record_current(status: Status | None, record: RunRecord) -> bool:
    return status is None or record.started_at >= status.started_at


def render_status_table(rows: Sequence[RunStatus]) -> str:
    """A line for every run, and how many there are of each state; without columns that say nothing of any run."""
    lines = [
        [
            row.name,
            row.state,
            "–" if row.step is None else f"{row.step}/{row.total_steps if row.total_steps is not None else '?'}",
            "–" if row.loss is None else f"{row.loss:.3f}",
            "–" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "–" if row.memory_bytes is None else format_bytes(row.memory_bytes, row.budget_bytes),
            "–" if row.seconds_left is None else _format_duration(row.seconds_left),
            row.job_id or "–",
            row.detail,
        ]
        for row in rows
    ]
    heads = ["run", "state", "step", "loss", "tokens/s", "memory", "left", "job", ""]
    told = [column for column in range(len(heads)) if any(line[column] not in {"–", ""} for line in lines)]
    heads, lines = [heads[column] for column in told], [[line[column] for column in told] for line in lines]
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{tabulate(lines, headers=heads, disable_numparse=True)}\n\n{len(rows)} runs: {counts}"


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
