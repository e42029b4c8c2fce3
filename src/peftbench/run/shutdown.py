"""Ends a run when it is asked to: between two steps while it trains, at once elsewhere.

It is asked by a signal (Ctrl-C, SIGTERM, SIGUSR1), or by a file in its folder, whose text says what asked. A launcher
stands between a job's script and the processes it launched, on one node or on many, and a signal that the launcher does
not know ends it, one that it knows leaves them half a minute; a file is seen by all of them, and hurries nobody.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_POLL_SECONDS = 0.5


class StopRequested(KeyboardInterrupt):
    """A run was asked to stop, and does."""

    def __init__(self, reason: str, *, on_all_ranks: bool = False) -> None:
        """``together``: all ranks stop here, and none need be told."""
        super().__init__(reason)
        self.reason, self.on_all_ranks = reason, on_all_ranks


def ignore_signals() -> None:
    """Let the process end as it is about to: the interpreter would be killed by what comes while it closes."""
    for number in SHUTDOWN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class ShutdownSignal:
    """Hears that a run is to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """The signal's name, or what the file says; None while nobody asked."""
        self._is_deferred = self._has_handlers = False
        self._file_reason: str | None = None

    def install_handlers(self) -> None:
        """Hear signals from now on, and files that are watched; in the main thread."""
        self._has_handlers = True
        for number in SHUTDOWN_SIGNALS:
            signal.signal(number, self._handle_signal)

    def watch_files(self, *files: Path) -> None:
        """Hear the first of ``files`` that comes to be, from a thread."""
        if self._has_handlers:
            threading.Thread(target=self._poll_files, args=files, daemon=True).start()

    @contextmanager
    def defer_to_step_end(self) -> Iterator[None]:
        """Within it a step is not broken off; whoever trains asks ``by`` after each. A second Ctrl-C breaks off.

        Raises:
            Interrupted: it was asked, and nobody looked any more.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.reason is not None:
            raise StopRequested(self.reason)

    def defer(self) -> None:
        """Let what is left be done: a record is being written. A second Ctrl-C breaks off still."""
        self._is_deferred = True

    def _handle_signal(self, signal_number: int, _frame: FrameType | None) -> None:
        again, self.reason = self.reason is not None, self._file_reason or signal.Signals(signal_number).name
        if not self._is_deferred or (again and signal_number == signal.SIGINT):
            raise StopRequested(self.reason)

    def _poll_files(self, *files: Path) -> None:
        waiting = threading.Event()
        while (file := next(filter(_file_exists, files), None)) is None:
            waiting.wait(_POLL_SECONDS)
        with suppress(OSError, ValueError):
            self._file_reason = file.read_text(encoding="utf-8").strip()
        self._file_reason = self._file_reason or file.name
        os.kill(os.getpid(), signal.SIGUSR1)  # the main thread is to hear it, wherever it is


def _file_exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a shared file system that does not answer for a while
        return False
