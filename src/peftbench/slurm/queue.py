"""What SLURM's queue says of a user's jobs."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

from peftbench.errors import SlurmError

_ASK = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r"]
_SECONDS = 30
_OVER = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"})


class Queued(NamedTuple):
    """A job that is in the queue."""

    state: str
    """As squeue(1) has it: PENDING, RUNNING, ..."""
    reason: str
    """Why it waits, or None as a word."""

    @property
    def lasts(self) -> bool:
        """Whether it is still to run, or runs."""
        return self.state not in _OVER


def queued() -> dict[str, Queued]:
    """Each of the user's jobs, by name (12, or 12_3 of an array); nothing where there is no SLURM.

    Raises:
        SlurmError: it does not answer.
    """
    if shutil.which(_ASK[0]) is None:
        return {}
    try:
        told = subprocess.run(_ASK, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise SlurmError(f"squeue does not answer ({' '.join(said.split())})", "try again when it does") from None
    rows = (line.split("|") for line in told.stdout.splitlines())
    return {row[0]: Queued(row[1], row[2]) for row in rows if len(row) == 3}
