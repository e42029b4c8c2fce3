"""One process at a time works in a run's folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from peftbench.common.filesystem import write_error
from peftbench.errors import RunLockedError
from peftbench.run_dir.status import read_status

_LOCK_FILE = ".lock"
_ACQUIRE_TIMEOUT_SECONDS = 2.0
"""Whoever looks how a run stands holds its lock for a moment."""


class Lock:
    """Holds a run's folder until the process ends, however it ends: the system lets go of it then (flock(2))."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file_lock = _build_file_lock(run_dir)

    def acquire(self) -> None:
        """Hold it from now on.

        Raises:
            BusyError: another process does.
            OutputError: the file system has no locks, or no place for one.
        """
        try:
            self._file_lock.acquire(timeout=_ACQUIRE_TIMEOUT_SECONDS)
        except Timeout:
            raise _build_locked_error(self.run_dir) from None
        except OSError as error:
            raise write_error(self.run_dir / _LOCK_FILE, error) from error

    def release(self) -> None:
        """Let others have it, and leave no file in a folder in which there is nothing else."""
        with suppress(OSError):
            if self._file_lock.is_locked and [path.name for path in self.run_dir.iterdir()] == [_LOCK_FILE]:
                (self.run_dir / _LOCK_FILE).unlink()
        self._file_lock.release()


def raise_if_locked(run_dir: Path) -> None:
    """Find out before anything is written there.

    Raises:
        BusyError: a process works in ``folder``.
    """
    if is_locked(run_dir):
        raise _build_locked_error(run_dir)


def is_locked(run_dir: Path) -> bool:
    """Whether a process works in ``folder`` now."""
    if not (run_dir / _LOCK_FILE).exists():
        return False
    lock = _build_file_lock(run_dir)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # not ours to open: what is known is what its status says
        return False
    lock.release()
    return False


def _build_file_lock(run_dir: Path) -> FileLock:
    # Where there is no flock(2), a marker in its place would stay for ever after a kill.
    return FileLock(run_dir / _LOCK_FILE, fallback_to_soft=False)


def _build_locked_error(run_dir: Path) -> RunLockedError:
    status = read_status(run_dir)
    whom = "" if status is None else f" by process {status.pid} on {status.host}, which began at {status.started_at}"
    return RunLockedError(f"{run_dir} is in use{whom}", "wait for it, or stop it first")
