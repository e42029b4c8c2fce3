"""Ends a run when it is asked to: between two steps while it trains, at once elsewhere.

It is asked by a signal (Ctrl-C, SIGTERM, SIGUSR1), or by a file in its folder, whose text says what asked. A launcher
stands between a job's script and the processes it launched, on one node or on many, and a signal that the launcher does
not know ends it, one that it knows leaves them half a minute; a file is seen by all of them, and hurries nobody.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ATTEMPT_ENV = "PEFTBENCH_JOB"
"""What an attempt is called by whoever starts it, so that a file which asked an earlier one asks nothing of it."""
STOP_LEAD_ENV = "PEFTBENCH_STOP_LEAD"
"""Seconds before its end at which a job is told to stop."""
_POLL_SECONDS = 0.5


class StopRequested(KeyboardInterrupt):
    """A run was asked to stop, and does."""

    def __init__(self, by: str, *, together: bool = False) -> None:
        """``together``: all ranks stop here, and none need be told."""
        super().__init__(by)
        self.by, self.together = by, together


def get_stop_file(folder: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The file that asks the run in ``folder`` to stop, once it is there."""
    job = environment.get(ATTEMPT_ENV, "")
    return folder / f".stop{f'-{job}' if job else ''}"


def clear_stop_files(*files: Path) -> None:
    """Take away what asked a run, which has heard it, or is another one than was meant."""
    for file in files:
        with suppress(OSError):
            file.unlink()


def ignore_signals() -> None:
    """Let the process end as it is about to: the interpreter would be killed by what comes while it closes."""
    for number in SHUTDOWN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class ShutdownSignal:
    """Hears that a run is to stop."""

    def __init__(self) -> None:
        self.by: str | None = None
        """The signal's name, or what the file says; None while nobody asked."""
        self._between_steps = self._listens = False
        self._written: str | None = None

    def listen(self) -> None:
        """Hear signals from now on, and files that are watched; in the main thread."""
        self._listens = True
        for number in SHUTDOWN_SIGNALS:
            signal.signal(number, self._heard)

    def watch(self, *files: Path) -> None:
        """Hear the first of ``files`` that comes to be, from a thread."""
        if self._listens:
            threading.Thread(target=self._look, args=files, daemon=True).start()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within it a step is not broken off; whoever trains asks ``by`` after each. A second Ctrl-C breaks off.

        Raises:
            Interrupted: it was asked, and nobody looked any more.
        """
        self._between_steps = True
        try:
            yield
        finally:
            self._between_steps = False
        if self.by is not None:
            raise StopRequested(self.by)

    def hold_off(self) -> None:
        """Let what is left be done: a record is being written. A second Ctrl-C breaks off still."""
        self._between_steps = True

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        again, self.by = self.by is not None, self._written or signal.Signals(number).name
        if not self._between_steps or (again and number == signal.SIGINT):
            raise StopRequested(self.by)

    def _look(self, *files: Path) -> None:
        waiting = threading.Event()
        while (file := next(filter(_file_exists, files), None)) is None:
            waiting.wait(_POLL_SECONDS)
        with suppress(OSError, ValueError):
            self._written = file.read_text(encoding="utf-8").strip()
        self._written = self._written or file.name
        os.kill(os.getpid(), signal.SIGUSR1)  # the main thread is to hear it, wherever it is


def _file_exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a shared file system that does not answer for a while
        return False
