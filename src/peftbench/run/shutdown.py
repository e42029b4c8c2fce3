"""ShutdownSignal: receive a stop request by signal or by stop file.

During training the run finishes its step first; in any other stage it stops at once. Signals are SIGINT (Ctrl-C),
SIGTERM and SIGUSR1; for stop files see ``peftbench.run_dir.stop_request``.
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
    """A run stops because it was requested to."""

    def __init__(self, reason: str, *, on_all_ranks: bool = False) -> None:
        """``on_all_ranks``: all ranks raise it at the same step, so that no rank has to notify the others."""
        super().__init__(reason)
        self.reason, self.on_all_ranks = reason, on_all_ranks


def ignore_signals() -> None:
    """Ignore signals during interpreter shutdown, so that a late signal cannot kill it."""
    for number in SHUTDOWN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class ShutdownSignal:
    """A stop request, received or not."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """The signal's name or the stop file's text; None before any request."""
        self._is_deferred = self._has_handlers = False
        self._file_reason: str | None = None

    def install_handlers(self) -> None:
        """Handle signals from now on, and stop files once they are watched. Call it in the main thread."""
        self._has_handlers = True
        for number in SHUTDOWN_SIGNALS:
            signal.signal(number, self._handle_signal)

    def watch_files(self, *files: Path) -> None:
        """Watch for the first of ``files`` to exist, in a thread."""
        if self._has_handlers:
            threading.Thread(target=self._poll_files, args=files, daemon=True).start()

    @contextmanager
    def defer_to_step_end(self) -> Iterator[None]:
        """Within the context, only set ``reason``: the training loop checks it after each step. A second Ctrl-C raises.

        Raises:
            StopRequested: the request came after the last check.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.reason is not None:
            raise StopRequested(self.reason)

    def defer(self) -> None:
        """Raise no more from now on, except on a second Ctrl-C: the record is being written."""
        self._is_deferred = True

    def _handle_signal(self, signal_number: int, _frame: FrameType | None) -> None:
        is_repeated = self.reason is not None
        self.reason = self._file_reason or signal.Signals(signal_number).name
        if not self._is_deferred or (is_repeated and signal_number == signal.SIGINT):
            raise StopRequested(self.reason)

    def _poll_files(self, *files: Path) -> None:
        wakeup = threading.Event()
        while (file := next(filter(_file_exists, files), None)) is None:
            wakeup.wait(_POLL_SECONDS)
        with suppress(OSError, ValueError):
            self._file_reason = file.read_text(encoding="utf-8").strip()
        self._file_reason = self._file_reason or file.name
        os.kill(os.getpid(), signal.SIGUSR1)  # interrupts the main thread, wherever it is


def _file_exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # e.g. a shared file system that is briefly unavailable
        return False
