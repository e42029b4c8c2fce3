"""Propagates a rank's failure to the others, which might otherwise block in a collective.

The failing rank writes a file to the run's folder; a watcher thread on every rank polls for it.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from accelerate.utils import broadcast_object_list

from peftbench.distributed import launcher_env
from peftbench.distributed.collectives import all_gather_objects
from peftbench.distributed.heartbeat import Heartbeat
from peftbench.record import Outcome

if TYPE_CHECKING:
    from accelerate import Accelerator

_RECORD_PENDING_FILE = "record-pending"
"""Exists until the main process has written the record."""
_POLL_SECONDS = 0.25
_GRACE_SECONDS = 3.0
"""Time that a notified rank has to fail by itself: ranks often run out of memory together."""


class FailureChannel:
    """Carries failures between the ranks of one run. With one process it does nothing."""

    def __init__(self, accelerator: Accelerator, run_dir: Path) -> None:
        self.rank, self.is_distributed = accelerator.process_index, accelerator.num_processes > 1
        name = [uuid.uuid4().hex]  # unlike that of an earlier run in the same folder
        if self.is_distributed and accelerator.is_main_process:
            for stale in run_dir.glob(".ended-*"):  # of a run that was killed
                _remove_dir(stale)
            with suppress(OSError):
                (run_dir / f".ended-{name[0]}").mkdir(parents=True)
                (run_dir / f".ended-{name[0]}" / _RECORD_PENDING_FILE).touch()
        if self.is_distributed:
            name = broadcast_object_list(name)
        self._local_processes = _find_local_processes(accelerator) if self.is_distributed else {}
        self._directory = run_dir / f".ended-{name[0]}"
        self._heartbeat = Heartbeat(accelerator, run_dir / f".ended-{name[0]}-heartbeat")
        self._closed = threading.Event()
        self._exit_lock = threading.Lock()

    def watch(self, on_failure: Callable[[dict[str, Any]], None]) -> None:
        """Call ``on_failure`` from a thread with another rank's failure, unless this rank exits by itself first."""
        if self.is_distributed:
            threading.Thread(target=self._poll, args=(on_failure,), daemon=True).start()

    def acquire_exit(self) -> None:
        """Return in the one thread that ends this rank; block every other thread until the process has exited."""
        if not self._exit_lock.acquire(blocking=False):
            threading.Event().wait()

    def report_failure(self, failure: dict[str, Any]) -> None:
        """Send ``failure``, which JSON can hold, to all other ranks."""
        if not self.is_distributed:
            return
        partial = self._directory / f".rank{self.rank}"
        with suppress(OSError):  # the others exit too, when the launcher finds that this process has exited
            partial.write_text(json.dumps(failure), encoding="utf-8")
            partial.replace(self._directory / f"rank{self.rank}.json")

    def read_failure(self) -> dict[str, Any] | None:
        """Return another rank's failure, None if there is none."""
        paths: list[Path] = []
        with suppress(OSError):  # the folder may be deleted concurrently
            paths = sorted(self._directory.glob("rank*.json")) if self.is_distributed else []
        failures = [_read_json(path) for path in paths if path.name != f"rank{self.rank}.json"]
        return next((failure for failure in failures if failure is not None), None)

    def find_gone_process(self, patience_seconds: float = 0.0) -> dict[str, Any] | None:
        """Return the failure of a process of this host that ended without a report, e.g. was killed; None if none did.

        A rank whose connection broke sees it before the process is gone: wait ``patience_seconds`` for it.
        """
        deadline = time.monotonic() + patience_seconds
        while not self._closed.is_set():
            for rank, process in self._local_processes.items():
                if not _is_alive(process) and not (self._directory / f"rank{rank}.json").exists():
                    message = f"process {rank} is gone: it was killed, e.g. because the machine ran out of memory"
                    return {"outcome": Outcome(kind="failed", rank=rank, error=message).model_dump(), "memory": {}}
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        return None

    def mark_record_written(self) -> None:
        """Release the ranks that wait for the record, and delete the channel's files."""
        self._closed.set()
        with suppress(OSError):
            (self._directory / _RECORD_PENDING_FILE).unlink()
        _remove_dir(self._directory)
        self._heartbeat.close()

    def wait_for_record(self) -> None:
        """Block until the main process has written the record or its host is lost.

        Its launcher would kill it as soon as another process exits.
        """
        while self.is_distributed and self._is_record_pending() and self._heartbeat.find_lost_host(0) is None:
            time.sleep(_POLL_SECONDS)

    def _is_record_pending(self) -> bool:
        try:
            return (self._directory / _RECORD_PENDING_FILE).exists()
        except OSError:  # a shared file system may fail for a while
            return True

    def _poll(self, on_failure: Callable[[dict[str, Any]], None]) -> None:
        notified = False
        while not self._closed.wait(_POLL_SECONDS):
            self._heartbeat.beat()
            if notified:
                continue
            failure, lost = self.read_failure() or self.find_gone_process(), self._heartbeat.find_lost_host()
            if failure is None and lost is not None:
                failure = {"outcome": Outcome(kind="failed", error=lost).model_dump(), "memory": {}}
            if failure is None or self._exit_lock.locked() or self._closed.wait(_GRACE_SECONDS):
                continue
            if not self._exit_lock.locked():  # otherwise this rank is exiting by itself
                notified = True
                # In another thread, since this one continues to send heartbeats.
                threading.Thread(target=on_failure, args=(failure,), daemon=True).start()


def _find_local_processes(accelerator: Accelerator) -> dict[int, psutil.Process]:
    """Return the processes of the other ranks on this host, by rank. A collective."""
    own = accelerator.process_index, launcher_env.get_node_rank(), os.getpid()
    processes = {}
    for rank, node, pid in all_gather_objects(accelerator, own):
        if node == own[1] and rank != own[0]:
            with suppress(psutil.Error):  # e.g. another namespace of processes
                processes[rank] = psutil.Process(pid)
    return processes


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _read_json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return None


def _remove_dir(directory: Path) -> None:
    with suppress(OSError):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
