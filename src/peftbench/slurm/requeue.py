"""What becomes of a job whose run was stopped for its time: begun anew, unless that would lead nowhere.

Run by a job's script when the run has ended: python -m peftbench.slurm.requeue --at-most N FOLDER
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

from peftbench.common.console import INTERRUPT_EXIT_CODE
from peftbench.errors import PeftbenchError, SlurmError, TimeLimitError
from peftbench.record import EXIT_CODES, RECORD_FILE, RunRecord, read_record
from peftbench.run_dir.layout import CHECKPOINT_METADATA_FILE, RunDir
from peftbench.run_dir.status import get_slurm_job_id, read_status
from peftbench.slurm.job_file import JobFile, read_job_file

_STOPPED_EXIT_CODES = frozenset({EXIT_CODES["preempted"], INTERRUPT_EXIT_CODE, 1, *range(128, 160)})
"""Exit codes of a run that was stopped, of a launcher whose processes were, and of what a signal has ended."""


def requeue(run_dir: Path, max_requeues: int, exit_code: int = EXIT_CODES["preempted"]) -> int:
    """Begin the job anew, if its run can gain by it; returns the exit code of its script.

    ``code`` is what the run ended with.

    Raises:
        SlurmError: it cannot, and why.
        TimeLimitError: it was stopped before it had begun, or kept nothing, or came no further in its time.
        RecordError: its record cannot be read.
    """
    job, status = get_slurm_job_id(), read_status(run_dir)
    if job is None:
        raise SlurmError(f"{run_dir} was stopped outside of SLURM; run it again to go on")
    if exit_code not in _STOPPED_EXIT_CODES:  # it came to an end of its own while it was told to stop
        return exit_code
    if status is None or (status.job_id, status.restart_count) != (
        job,
        int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    ):
        raise _build_time_limit_error(f"it was told to stop before the run in {run_dir} had begun")
    record = _read_record_since(status.started_at, run_dir)
    if record is not None and record.outcome.kind != "preempted":
        return EXIT_CODES[record.outcome.kind]
    if record is None and not _has_checkpoint_since(
        status.started_at, run_dir
    ):  # it was killed before it could write one
        raise _build_time_limit_error(f"{run_dir} was killed after it had been told to stop, and kept nothing")
    if record is not None and not made_progress(record):
        raise _build_time_limit_error(f"{run_dir} {_describe_position(record)} before it was told to stop")
    before = read_job_file(run_dir)
    if before is None or before.job_id != job:  # handed in by hand
        before = JobFile(job_id=job)
    if before.requeue_count >= max_requeues:
        raise SlurmError(
            f"job {job} has begun itself anew {before.requeue_count} times, which is as often as it may; submit again"
        )
    # Before: SLURM ends this very process when it does so.
    before.model_copy(update={"requeued": before.requeue_count + 1}).write(run_dir)
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SlurmError(f"job {job} could not be begun anew: scontrol cannot be run ({error.strerror})") from error
    if done.returncode:
        raise SlurmError(f"job {job} could not be begun anew: {done.stderr.strip()}")
    after = f"after step {record.outcome.step}" if record is not None else "from its newest checkpoint"
    print(f"job {job} begins itself anew for the {before.requeue_count + 1}. time, {after}", flush=True)
    return EXIT_CODES["preempted"]


def made_progress(record: RunRecord) -> bool:
    """Whether the last process of a run finished a step and kept it."""
    step = record.outcome.step
    return step is not None and step > _get_resume_step(record) and step <= record.steps


def _describe_position(record: RunRecord) -> str:
    if not record.steps:
        return f"came no further than its phase {record.outcome.phase}"
    return f"began at step {_get_resume_step(record)} and came no further"


def _build_time_limit_error(reason: str) -> TimeLimitError:
    return TimeLimitError(f"the job's time is too short: {reason}; give a longer slurm.time, and submit again")


def _read_record_since(started_at: str, run_dir: Path) -> RunRecord | None:
    """The record of the attempt that began then; one that lies there may be of an attempt before."""
    if not (run_dir / RECORD_FILE).exists():
        return None
    record = read_record(run_dir / RECORD_FILE)
    return record if record.started_at >= started_at else None


def _has_checkpoint_since(started_at: str, run_dir: Path) -> bool:
    since = datetime.datetime.fromisoformat(started_at).timestamp()
    checkpoints = RunDir(run_dir).find_checkpoints()
    return any((path / CHECKPOINT_METADATA_FILE).stat().st_mtime >= since for path in checkpoints)


def _get_resume_step(record: RunRecord) -> int:
    return record.resumed_after[-1] if record.resumed_after else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at-most", type=int, default=10)
    parser.add_argument("--code", type=int, default=EXIT_CODES["preempted"])
    asked = parser.parse_args()
    try:
        return requeue(asked.folder, asked.at_most, asked.code)
    except PeftbenchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
