"""Detects a lost host: each host of a run touches a file in the run's folder, and the others watch its time.

Without it, a collective waits for a lost host until its timeout, which must allow for a rank that loads or evaluates:
half an hour. All hosts share the run's folder anyway, for checkpoints.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.distributed import launcher_env
from peftbench.distributed.collectives import all_gather_objects
from peftbench.errors import OutputError

if TYPE_CHECKING:
    from accelerate import Accelerator

HEARTBEAT_INTERVAL_SECONDS = 5.0
HEARTBEAT_TIMEOUT_SECONDS = 60.0
"""A host whose file has not changed for this long is lost."""
_STALLED_SECONDS = 20.0
"""After a pause of its own this long, a host restarts the timeouts of the others."""


@dataclass
class _Host:
    """Another host."""

    name: str
    last_seen: str = ""
    last_seen_at: float = field(default_factory=time.monotonic)


class Heartbeat:
    """Sends this host's heartbeat and checks those of the others. With one host it does nothing."""

    def __init__(self, accelerator: Accelerator, directory: Path) -> None:
        """Exchange the hosts' names, and send the first heartbeat. A collective; all hosts share ``directory``.

        Raises:
            OutputError: the hosts do not share ``directory``.
        """
        rank, name = accelerator.process_index, socket.gethostname()
        node = launcher_env.get_node_rank()  # host names need not be unique
        leads = accelerator.is_local_main_process
        ranks = all_gather_objects(accelerator, (rank, node, name, leads))
        self._directory, self._rank = directory, rank
        self._hosts = {r: _Host(host) for r, other, host, is_leader in ranks if is_leader and other != node}
        self._is_sender = leads and bool(self._hosts)
        self._sequence, self._last_sent_at, self._last_checked_at = 0, float("-inf"), time.monotonic()
        self.beat()
        # A barrier, so that no host caches a file as missing that another is about to write.
        all_gather_objects(accelerator, None)
        unseen = [host.name for leader, host in self._hosts.items() if not self._read_mtime(leader)]
        if any(all_gather_objects(accelerator, unseen)):
            raise OutputError(
                f"{directory.parent} is not shared by all machines of this run; set output_dir to a shared folder"
            )

    def beat(self) -> None:
        """Send this host's heartbeat if the interval has passed."""
        now = time.monotonic()
        if not self._is_sender or now - self._last_sent_at < HEARTBEAT_INTERVAL_SECONDS:
            return
        self._sequence, self._last_sent_at = self._sequence + 1, now
        path = self._path(self._rank)
        with suppress(OSError):  # if the error lasts, the other hosts report this one as lost
            self._directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text("alive", encoding="ascii")
            os.utime(path, (self._sequence, self._sequence))  # works on a full disk too

    def find_lost_host(self, only_rank: int | None = None) -> str | None:
        """Describe a lost host, None if there is none; with ``only_rank`` check only the host of that rank.

        Uses only this host's clock.
        """
        now = time.monotonic()
        stalled, self._last_checked_at = now - self._last_checked_at > _STALLED_SECONDS, now
        for rank, host in self._hosts.items():
            if only_rank is not None and rank != only_rank:
                continue
            mtime = self._read_mtime(rank)
            if mtime != host.last_seen or stalled:
                host.last_seen, host.last_seen_at = mtime, now
            elif now - host.last_seen_at > HEARTBEAT_TIMEOUT_SECONDS:
                return f"lost process {rank} on {host.name}: no heartbeat for {HEARTBEAT_TIMEOUT_SECONDS:.0f} s"
        return None

    def close(self) -> None:
        """Delete the files. A host that is still sending may leave one, which nothing reads."""
        with suppress(OSError):
            for path in self._directory.iterdir():
                path.unlink()
            self._directory.rmdir()

    def _path(self, rank: int) -> Path:
        return self._directory / f"rank{rank}"

    def _read_mtime(self, rank: int) -> str:
        with suppress(OSError):
            return str(self._path(rank).stat().st_mtime_ns)
        return ""
