"""What becomes of a job whose run was stopped for its time: begun anew, unless that would lead nowhere.

Run by a job's script when the run has ended: python -m peftbench.slurm.requeue --at-most N FOLDER
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from peftbench.errors import PeftbenchError, SlurmError, TimeLimitError
from peftbench.record import EXIT_CODES, FILE, FINAL, RunRecord, read_record
from peftbench.status import read_status, slurm_job


def requeue(folder: Path, at_most: int) -> int:
    """Begin the job anew, if its run can gain by it; returns the exit code of its script.

    Raises:
        SlurmError: it cannot, and why.
        TimeLimitError: it was stopped before it had begun, or came no further in its time.
        RecordError: its record cannot be read.
    """
    job, restarts = slurm_job(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is None:
        raise SlurmError(f"{folder} was stopped outside of SLURM; run it again to go on")
    if not _has_begun(folder, job, restarts):  # a record, if there is one, is of an attempt before this
        raise TimeLimitError(
            f"the job's time is too short: it was told to stop before the run in {folder} had begun; give a longer "
            "slurm.time, and submit again"
        )
    record = read_record(folder / FILE)
    if record.outcome.kind != "preempted":
        return 0 if record.outcome.kind in FINAL else EXIT_CODES[record.outcome.kind]
    if not gained(record):
        raise TimeLimitError(
            f"the job's time is too short: {folder} {_where(record)} before it was told to stop; give a longer "
            "slurm.time, and submit again"
        )
    if restarts >= at_most:
        raise SlurmError(f"job {job} was begun anew {restarts} times, which is as often as it may be; submit again")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlurmError(f"job {job} could not be begun anew: {done.stderr.strip()}")
    print(f"job {job} begins anew, for the {restarts + 1}. time, after step {record.outcome.step}", flush=True)
    return EXIT_CODES["preempted"]


def gained(record: RunRecord) -> bool:
    """Whether the last process of a run finished a step and kept it."""
    step = record.outcome.step
    return step is not None and step > _began_at(record) and step <= record.steps


def _where(record: RunRecord) -> str:
    if not record.steps:
        return f"came no further than its phase {record.outcome.phase}"
    return f"began at step {_began_at(record)} and came no further"


def _has_begun(folder: Path, job: str, restarts: int) -> bool:
    status = read_status(folder)
    return status is not None and (status.job, status.restarts) == (job, restarts)


def _began_at(record: RunRecord) -> int:
    return record.resumed_after[-1] if record.resumed_after else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at-most", type=int, default=10)
    asked = parser.parse_args()
    try:
        return requeue(asked.folder, asked.at_most)
    except PeftbenchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
