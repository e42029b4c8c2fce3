"""What SLURM's queue says of a user's jobs."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

from peftbench.errors import SlurmError

_SQUEUE_COMMAND = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r"]
_SQUEUE_TIMEOUT_SECONDS = 30
_TERMINAL_STATES = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"})


class QueuedJob(NamedTuple):
    """A job that is in the queue."""

    state: str
    """As squeue(1) has it: PENDING, RUNNING, ..."""
    reason: str
    """Why it waits, or None as a word."""

    @property
    def is_active(self) -> bool:
        """Whether it is still to run, or runs."""
        return self.state not in _TERMINAL_STATES


def list_queued_jobs() -> dict[str, QueuedJob]:
    """Each of the user's jobs, by name (12, or 12_3 of an array); nothing where there is no SLURM.

    Raises:
        SlurmError: it does not answer.
    """
    if shutil.which(_SQUEUE_COMMAND[0]) is None:
        return {}
    try:
        told = subprocess.run(
            _SQUEUE_COMMAND, capture_output=True, text=True, timeout=_SQUEUE_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise SlurmError(f"squeue does not answer ({' '.join(said.split())})", "try again when it does") from None
    rows = (line.split("|") for line in told.stdout.splitlines())
    return {row[0]: QueuedJob(row[1], row[2]) for row in rows if len(row) == 3}
