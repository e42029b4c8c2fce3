"""One process at a time works in a run's folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from peftbench.errors import BusyError
from peftbench.status import read_status

_FILE = ".lock"


class Lock:
    """Holds a run's folder until the process ends, however it ends: the system lets go of it then (flock(2))."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / _FILE)

    def hold(self) -> None:
        """Hold it from now on.

        Raises:
            BusyError: another process does.
        """
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise _busy(self.folder) from None

    def let_go(self) -> None:
        """Let others have it, and leave no file in a folder in which there is nothing else."""
        held = self._lock.is_locked
        self._lock.release()
        with suppress(OSError):
            if held and [path.name for path in self.folder.iterdir()] == [_FILE]:
                (self.folder / _FILE).unlink()


def refuse_if_held(folder: Path) -> None:
    """Find out before anything is written there.

    Raises:
        BusyError: a process works in ``folder``.
    """
    if held(folder):
        raise _busy(folder)


def held(folder: Path) -> bool:
    """Whether a process works in ``folder`` now."""
    if not (folder / _FILE).exists():
        return False
    lock = FileLock(folder / _FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # not ours to open: what is known is what its status says
        return False
    lock.release()
    return False


def _busy(folder: Path) -> BusyError:
    status = read_status(folder)
    whom = "" if status is None else f" by process {status.pid} on {status.host}, which began at {status.started_at}"
    return BusyError(f"{folder} is in use{whom}", "wait for it, or stop it first")
