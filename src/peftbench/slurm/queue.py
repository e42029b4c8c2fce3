"""The user's jobs in SLURM's queue, and the size limit of job arrays."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import NamedTuple

from peftbench.errors import SlurmError

_SQUEUE_COMMAND = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r"]
_SQUEUE_TIMEOUT_SECONDS = 30
_DEFAULT_MAX_ARRAY_SIZE = 1001
"""slurm.conf(5); the largest index is one less."""
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


def read_max_array_size() -> int:
    """Return the largest number of tasks in a job array of this cluster; SLURM's default if it cannot be read."""
    if shutil.which("scontrol") is None:
        return _DEFAULT_MAX_ARRAY_SIZE
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SQUEUE_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # sbatch refuses a larger array
        return _DEFAULT_MAX_ARRAY_SIZE
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)$", done.stdout, re.MULTILINE)
    return max(1, int(match.group(1))) if match else _DEFAULT_MAX_ARRAY_SIZE


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
