"""The lock on a run's folder: one process at a time may work in it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from peftbench.common.filesystem import write_error
from peftbench.errors import RunLockedError
from peftbench.run_dir.layout import LOCK_FILE, RunDir
from peftbench.run_dir.status import read_status

_ACQUIRE_TIMEOUT_SECONDS = 2.0
"""``is_locked`` holds the lock for a moment to test it."""


class Lock:
    """An exclusive lock on a run's folder. The system releases it when the process ends, killed or not (flock(2))."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file_lock = _build_file_lock(run_dir)

    def acquire(self) -> None:
        """Acquire the lock.

        Raises:
            RunLockedError: another process holds it.
            OutputError: the file system is full or does not support locks.
        """
        try:
            self._file_lock.acquire(timeout=_ACQUIRE_TIMEOUT_SECONDS)
        except Timeout:
            raise _build_locked_error(self.run_dir) from None
        except OSError as error:
            raise write_error(RunDir(self.run_dir).lock_file, error) from error

    def release(self) -> None:
        """Release the lock; delete its file if nothing else is in the folder."""
        with suppress(OSError):
            if self._file_lock.is_locked and [path.name for path in self.run_dir.iterdir()] == [LOCK_FILE]:
                RunDir(self.run_dir).lock_file.unlink()
        self._file_lock.release()


def raise_if_locked(run_dir: Path) -> None:
    """Raise an error if another process works in ``run_dir``.

    Raises:
        RunLockedError: another process holds the lock.
    """
    if is_locked(run_dir):
        raise _build_locked_error(run_dir)


def is_locked(run_dir: Path) -> bool:
    """True if a process holds the lock on ``run_dir``. Creates no file."""
    if not RunDir(run_dir).lock_file.exists():
        return False
    lock = _build_file_lock(run_dir)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # no permission to open it: the status file is all that can be read
        return False
    lock.release()
    return False


def _build_file_lock(run_dir: Path) -> FileLock:
    # The soft fallback is a marker file, which would remain after a kill.
    return FileLock(RunDir(run_dir).lock_file, fallback_to_soft=False)


def _build_locked_error(run_dir: Path) -> RunLockedError:
    status = read_status(run_dir)
    owner = "" if status is None else f" by process {status.pid} on {status.host}, started at {status.started_at}"
    return RunLockedError(f"{run_dir} is in use{owner}", "wait until it ends, or stop it first")
