"""How hosts of one run know of each other that they are there: each renews a file in the run's folder.

A host that vanishes says nothing, and a collective waits for it until its own time is up, which must be enough for a
rank that loads or evaluates: half an hour. The folder is shared by all hosts anyway, for checkpoints.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.distributed.collectives import all_gather_objects
from peftbench.errors import OutputError

if TYPE_CHECKING:
    from accelerate import Accelerator

HEARTBEAT_INTERVAL_SECONDS = 5.0
HEARTBEAT_TIMEOUT_SECONDS = 60.0
"""A host of which nothing was heard for so long is gone."""
_STALLED_SECONDS = 20.0
"""Whoever has not looked for so long was held up itself, and knows nothing of the others."""


@dataclass
class _Host:
    """Another host, by the rank that leads there."""

    name: str
    last_seen: str = ""
    last_seen_at: float = field(default_factory=time.monotonic)


class Heartbeat:
    """Of this host, and those of the others. With one host there is nothing to hear."""

    def __init__(self, accelerator: Accelerator, directory: Path) -> None:
        """All ranks at once. ``folder``, which all hosts share, holds a file for each."""
        rank, name = accelerator.process_index, socket.gethostname()
        node = os.environ.get("GROUP_RANK", "0")  # hosts may be alike in name
        leads = accelerator.is_local_main_process
        told = all_gather_objects(accelerator, (rank, node, name, leads))
        self._directory, self._rank = directory, rank
        self._hosts = {r: _Host(called) for r, other, called, leader in told if leader and other != node}
        self._is_sender = leads and bool(self._hosts)
        self._sequence, self._last_sent_at, self._last_checked_at = 0, float("-inf"), time.monotonic()
        self.beat()
        all_gather_objects(
            accelerator, None
        )  # each finds what the others wrote, and remembers no file that is not there
        unseen = [host.name for leader, host in self._hosts.items() if not self._read_mtime(leader)]
        if any(all_gather_objects(accelerator, unseen)):
            raise OutputError(
                f"{directory.parent} is not one folder for all machines of this run; give one that they share"
            )

    def beat(self) -> None:
        """Say that this host is there, if it is time to."""
        now = time.monotonic()
        if not self._is_sender or now - self._last_sent_at < HEARTBEAT_INTERVAL_SECONDS:
            return
        self._sequence, self._last_sent_at = self._sequence + 1, now
        path = self._path(self._rank)
        with suppress(OSError):  # the others find out if it lasts
            self._directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text("here", encoding="ascii")
            os.utime(path, (self._sequence, self._sequence))  # for which there is room on a full disk

    def find_lost_host(self, only_rank: int | None = None) -> str | None:
        """Which host is gone, in words, None while all are heard of; or ``only`` that which this rank leads.

        By this host's clock alone.
        """
        now = time.monotonic()
        stalled, self._last_checked_at = now - self._last_checked_at > _STALLED_SECONDS, now
        for rank, host in self._hosts.items():
            if only_rank is not None and rank != only_rank:
                continue
            found = self._read_mtime(rank)
            if found != host.last_seen or stalled:
                host.last_seen, host.last_seen_at = found, now
            elif now - host.last_seen_at > HEARTBEAT_TIMEOUT_SECONDS:
                return f"process {rank} on {host.name} is gone: nothing was heard of its host for {HEARTBEAT_TIMEOUT_SECONDS:.0f} s"
        return None

    def close(self) -> None:
        """Take the files away; whoever comes late may leave one, which nobody reads."""
        with suppress(OSError):
            for path in self._directory.iterdir():
                path.unlink()
            self._directory.rmdir()

    def _path(self, rank: int) -> Path:
        return self._directory / f"pulse{rank}"

    def _read_mtime(self, rank: int) -> str:
        with suppress(OSError):
            return str(self._path(rank).stat().st_mtime_ns)
        return ""
