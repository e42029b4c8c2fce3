"""One process at a time works in a run's folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from peftbench.errors import RunLockedError
from peftbench.common.filesystem import write_error
from peftbench.run_dir.status import read_status

_LOCK_FILE = ".lock"
_ACQUIRE_TIMEOUT_SECONDS = 2.0
"""Whoever looks how a run stands holds its lock for a moment."""


class Lock:
    """Holds a run's folder until the process ends, however it ends: the system lets go of it then (flock(2))."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = _build_file_lock(folder)

    def hold(self) -> None:
        """Hold it from now on.

        Raises:
            BusyError: another process does.
            OutputError: the file system has no locks, or no place for one.
        """
        try:
            self._lock.acquire(timeout=_ACQUIRE_TIMEOUT_SECONDS)
        except Timeout:
            raise _build_locked_error(self.folder) from None
        except OSError as error:
            raise write_error(self.folder / _LOCK_FILE, error) from error

    def let_go(self) -> None:
        """Let others have it, and leave no file in a folder in which there is nothing else."""
        with suppress(OSError):
            if self._lock.is_locked and [path.name for path in self.folder.iterdir()] == [_LOCK_FILE]:
                (self.folder / _LOCK_FILE).unlink()
        self._lock.release()


def raise_if_locked(folder: Path) -> None:
    """Find out before anything is written there.

    Raises:
        BusyError: a process works in ``folder``.
    """
    if is_locked(folder):
        raise _build_locked_error(folder)


def is_locked(folder: Path) -> bool:
    """Whether a process works in ``folder`` now."""
    if not (folder / _LOCK_FILE).exists():
        return False
    lock = _build_file_lock(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # not ours to open: what is known is what its status says
        return False
    lock.release()
    return False


def _build_file_lock(folder: Path) -> FileLock:
    # Where there is no flock(2), a marker in its place would stay for ever after a kill.
    return FileLock(folder / _LOCK_FILE, fallback_to_soft=False)


def _build_locked_error(folder: Path) -> RunLockedError:
    status = read_status(folder)
    whom = "" if status is None else f" by process {status.pid} on {status.host}, which began at {status.started_at}"
    return RunLockedError(f"{folder} is in use{whom}", "wait for it, or stop it first")
