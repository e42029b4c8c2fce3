"""The user's jobs in SLURM's queue."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

from peftbench.errors import SlurmError

_SQUEUE_COMMAND = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r"]
_SQUEUE_TIMEOUT_SECONDS = 30
_TERMINAL_STATES = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"})


class QueuedJob(NamedTuple):
    """A job in the queue."""

    state: str
    """State as in squeue(1): PENDING, RUNNING, ..."""
    reason: str
    """Reason for which the job is pending; the string "None" if it is not."""

    @property
    def is_active(self) -> bool:
        """True if the job is pending or running."""
        return self.state not in _TERMINAL_STATES


def list_queued_jobs() -> dict[str, QueuedJob]:
    """Return the user's jobs by id (12, or 12_3 for an array task); an empty dictionary if SLURM is not installed.

    Raises:
        SlurmError: squeue fails or times out.
    """
    if shutil.which(_SQUEUE_COMMAND[0]) is None:
        return {}
    try:
        done = subprocess.run(
            _SQUEUE_COMMAND,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SQUEUE_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise SlurmError(f"squeue failed ({' '.join(reason.split())})", "try again later") from None
    rows = (line.split("|") for line in done.stdout.splitlines())
    return {row[0]: QueuedJob(row[1], row[2]) for row in rows if len(row) == 3}
