"""The stop file: its existence in a run's folder requests the run to stop, its text names the reason.

A file reaches processes that a signal does not. A launcher sits between a job script and the training processes, on one
node or several: a signal it does not handle ends the launcher, one it handles leaves the processes 30 seconds. Every
process can see the file, and none is killed by it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

ATTEMPT_ENV = "PEFTBENCH_JOB"
"""Environment variable with the name of one attempt at a run, so that a stop file for an earlier attempt is ignored."""
STOP_LEAD_ENV = "PEFTBENCH_STOP_LEAD"
"""Environment variable with the seconds between a job's stop request and its time limit."""


def get_stop_file(run_dir: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the stop file for the attempt that ``environment`` names, or for any attempt if none."""
    attempt = environment.get(ATTEMPT_ENV, "")
    return run_dir / f".stop{f'-{attempt}' if attempt else ''}"


def clear_stop_files(*files: Path) -> None:
    """Delete stop files that were handled, or that an earlier attempt left."""
    for file in files:
        with suppress(OSError):
            file.unlink()
