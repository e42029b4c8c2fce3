"""Requeue a job whose run was stopped at the time limit, unless the run made no progress.

The batch script runs it after the run has ended: ``python -m peftbench.slurm.requeue --max-requeues N FOLDER``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

from peftbench.common.console import INTERRUPT_EXIT_CODE
from peftbench.common.output_encoding import replace_unencodable_characters
from peftbench.errors import PeftbenchError, SlurmError, TimeLimitError
from peftbench.record import EXIT_CODES, RECORD_FILE, RunRecord, read_record
from peftbench.run_dir.layout import CHECKPOINT_METADATA_FILE, RunDir
from peftbench.run_dir.status import get_slurm_job_id, read_status
from peftbench.slurm.job_file import JobFile, read_job_file

_STOPPED_EXIT_CODES = frozenset({EXIT_CODES["preempted"], INTERRUPT_EXIT_CODE, 1, *range(128, 160)})
"""Exit codes of a stopped run, of a launcher whose processes were stopped, and of a process ended by a signal."""


def requeue(run_dir: Path, max_requeues: int, exit_code: int = EXIT_CODES["preempted"]) -> int:
    """Requeue the job if its run made progress. Return the exit code for the batch script.

    ``exit_code`` is the run's.

    Raises:
        SlurmError: outside a job, after ``max_requeues`` requeues, or if scontrol fails.
        TimeLimitError: the run stopped before its start, saved no checkpoint, or completed no step.
        RecordError: the run's record cannot be read.
    """
    job_id, status = get_slurm_job_id(), read_status(run_dir)
    if job_id is None:
        raise SlurmError(f"{run_dir} was stopped outside SLURM; run it again to resume")
    if exit_code not in _STOPPED_EXIT_CODES:  # the run ended by itself although a stop was requested
        return exit_code
    if status is None or (status.job_id, status.restart_count) != (
        job_id,
        int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    ):
        raise _build_time_limit_error(f"the stop request came before the start of the run in {run_dir}")
    record = _read_record_since(status.started_at, run_dir)
    if record is not None and record.outcome.kind != "preempted":
        return EXIT_CODES[record.outcome.kind]
    if record is None and not _has_checkpoint_since(status.started_at, run_dir):  # killed before it wrote a record
        raise _build_time_limit_error(f"the run in {run_dir} was killed after the stop request and saved no checkpoint")
    if record is not None and not made_progress(record):
        raise _build_time_limit_error(f"the run in {run_dir} {_describe_position(record)} before the stop request")
    job_file = read_job_file(run_dir)
    if job_file is None or job_file.job_id != job_id:  # submitted without peftbench submit
        job_file = JobFile(job_id=job_id)
    if job_file.requeue_count >= max_requeues:
        raise SlurmError(
            f"job {job_id} was requeued {job_file.requeue_count} times, the limit; submit it again to resume"
        )
    attempt = job_file.requeue_count + 1
    # Written first, since SLURM ends this process when it requeues the job.
    job_file.model_copy(update={"requeue_count": attempt}).write(run_dir)
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job_id], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise SlurmError(f"cannot requeue job {job_id}: cannot run scontrol ({error.strerror})") from error
    if done.returncode:
        raise SlurmError(f"cannot requeue job {job_id}: {done.stderr.strip()}")
    position = f"after step {record.outcome.step}" if record is not None else "from its latest checkpoint"
    print(f"requeued job {job_id} (requeue {attempt} of {max_requeues}), resuming {position}", flush=True)
    return EXIT_CODES["preempted"]


def made_progress(record: RunRecord) -> bool:
    """True if the last process of a run completed a step and saved it."""
    step = record.outcome.step
    return step is not None and step > _get_resume_step(record) and step <= record.steps


def _describe_position(record: RunRecord) -> str:
    if not record.steps:
        return f"reached only its phase {record.outcome.phase}"
    return f"made no progress from step {_get_resume_step(record)}"


def _build_time_limit_error(reason: str) -> TimeLimitError:
    return TimeLimitError(f"the job's time limit is too short: {reason}; give a longer slurm.time and submit again")


def _read_record_since(started_at: str, run_dir: Path) -> RunRecord | None:
    """Return the record of the attempt that started then; None if the record is of an earlier attempt."""
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
    parser.add_argument("--max-requeues", "--at-most", type=int, default=10)  # queued jobs use the old name
    parser.add_argument("--code", type=int, default=EXIT_CODES["preempted"])
    args = parser.parse_args()
    replace_unencodable_characters()
    try:
        return requeue(args.folder, args.max_requeues, args.code)
    except PeftbenchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
