"""How a rank that cannot go on tells the others, which may be waiting for it and would wait for ever.

It leaves word in the run's folder, and each rank has a thread that looks there.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from peftbench.distributed.heartbeat import Heartbeat
from peftbench.record import Outcome

if TYPE_CHECKING:
    from accelerate import Accelerator

_RECORD_PENDING_FILE = "unrecorded"
"""There until the record is."""
_POLL_SECONDS = 0.25
_GRACE_SECONDS = 3.0
"""For a rank that was told, to come to an end of its own: what one runs out of, all often do."""


class FailureChannel:
    """The ranks of one run; with one process there is nobody to tell."""

    def __init__(self, accelerator: Accelerator, run_dir: Path) -> None:
        self.rank, self.is_distributed = accelerator.process_index, accelerator.num_processes > 1
        name = [uuid.uuid4().hex]  # which is not the one of a run before this
        if self.is_distributed and accelerator.is_main_process:
            for old in run_dir.glob(".ended-*"):  # words of a run that was killed
                _remove_dir(old)
            with suppress(OSError):
                (run_dir / f".ended-{name[0]}").mkdir(parents=True)
                (run_dir / f".ended-{name[0]}" / _RECORD_PENDING_FILE).touch()
        if self.is_distributed:
            name = broadcast_object_list(name)
        self._directory = run_dir / f".ended-{name[0]}"
        self._heartbeat = Heartbeat(accelerator, run_dir / f".ended-{name[0]}-pulse")
        self._closed = threading.Event()
        self._exit_lock = threading.Lock()

    def watch(self, on_failure: Callable[[dict[str, Any]], None]) -> None:
        """Call ``when_told`` with what another rank has told, from a thread, unless this rank ends of itself."""
        if self.is_distributed:
            threading.Thread(target=self._poll, args=(on_failure,), daemon=True).start()

    def acquire_exit(self) -> None:
        """Be the one thread that ends this rank; any other that comes waits here until the process is gone."""
        if not self._exit_lock.acquire(blocking=False):
            threading.Event().wait()

    def report_failure(self, failure: dict[str, Any]) -> None:
        """Tell all others; ``word`` is plain."""
        if not self.is_distributed:
            return
        unfinished = self._directory / f".rank{self.rank}"
        with suppress(OSError):  # they end as well, but later, when the launcher finds this one gone; or have ended
            unfinished.write_text(json.dumps(failure), encoding="utf-8")
            unfinished.replace(self._directory / f"rank{self.rank}.json")

    def read_failure(self) -> dict[str, Any] | None:
        """What another rank has told."""
        paths: list[Path] = []
        with suppress(OSError):  # it may be taken away in this moment
            paths = sorted(self._directory.glob("rank*.json")) if self.is_distributed else []
        words = [_read_json(path) for path in paths if path.name != f"rank{self.rank}.json"]
        return next((word for word in words if word is not None), None)

    def mark_record_written(self) -> None:
        """The main process has written its record, and nobody need stay for it."""
        self._closed.set()
        with suppress(OSError):
            (self._directory / _RECORD_PENDING_FILE).unlink()
        _remove_dir(self._directory)
        self._heartbeat.close()

    def wait_for_record(self) -> None:
        """Stay until the main process has written its record, or is gone: its launcher ends it when another ends."""
        while self.is_distributed and self._is_record_pending() and self._heartbeat.find_lost_host(0) is None:
            time.sleep(_POLL_SECONDS)

    def _is_record_pending(self) -> bool:
        try:
            return (self._directory / _RECORD_PENDING_FILE).exists()
        except OSError:  # a shared file system that does not answer for a while
            return True

    def _poll(self, on_failure: Callable[[dict[str, Any]], None]) -> None:
        told = False
        while not self._closed.wait(_POLL_SECONDS):
            self._heartbeat.beat()
            if told:
                continue
            word, lost = self.read_failure(), self._heartbeat.find_lost_host()
            if word is None and lost is not None:
                word = {"outcome": Outcome(kind="failed", error=lost).model_dump(), "memory": {}}
            if word is None or self._exit_lock.locked() or self._closed.wait(_GRACE_SECONDS):
                continue
            if not self._exit_lock.locked():  # else it comes to an end of its own
                told = True  # in another thread, for this host goes on to beat
                threading.Thread(target=on_failure, args=(word,), daemon=True).start()


def _read_json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return None


def _remove_dir(directory: Path) -> None:
    with suppress(OSError):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
