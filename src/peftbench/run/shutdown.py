"""ShutdownSignal: receive a stop request by signal or by stop file.

During training the run finishes its step first; in any other stage it stops at once. Signals are SIGINT (Ctrl-C),
SIGTERM, SIGUSR1 and, unless it is ignored as under nohup, SIGHUP (a closed terminal). For stop files see
``peftbench.run_dir.stop_request``.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
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
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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
        self.raise_if_requested()

    def raise_if_requested(self) -> None:
        """Raise if a stop was requested: a library may have caught the exception that the handler raised.

        Raises:
            StopRequested: a stop was requested.
        """
        if self.reason is not None:
            raise StopRequested(self.reason)

    def defer(self) -> None:
        """Raise no more from now on, except on a second Ctrl-C, e.g. because the record is being written."""
        self._is_deferred = True

    def resume(self) -> None:
        """Raise on a stop request from now on; undoes :meth:`defer`.

        Raises:
            StopRequested: a stop was requested while requests were deferred.
        """
        self._is_deferred = False
        self.raise_if_requested()

    def _handle_signal(self, signal_number: int, _frame: FrameType | None) -> None:
        _discard_output_to_lost_terminal(is_hangup=signal_number == signal.SIGHUP)
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


def _discard_output_to_lost_terminal(*, is_hangup: bool) -> None:
    """Discard further output to a terminal that is gone: writing to it would raise an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            is_terminal = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            if is_terminal and (is_hangup or _is_hung_up(descriptor)):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


def _is_hung_up(terminal: int) -> bool:
    try:
        os.write(terminal, b"")
    except OSError:
        return True
    return False


def _file_exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # e.g. a shared file system that is briefly unavailable
        return False
