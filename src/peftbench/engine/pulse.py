"""How hosts of one run know of each other that they are there: each renews a file in the run's folder.

A host that vanishes says nothing, and a collective waits for it until its own time is up, which must be enough for a
rank that loads or evaluates: half an hour. The folder is shared by all hosts anyway, for checkpoints.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.engine.ranks import gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

BEAT_SECONDS = 5.0
LOST_SECONDS = 60.0
"""A host of which nothing was heard for so long is gone."""


class Pulse:
    """Of this host, and those of the others. With one host there is nothing to hear."""

    def __init__(self, accelerator: Accelerator) -> None:
        rank, host = accelerator.process_index, socket.gethostname()
        leads = accelerator.is_local_main_process
        node = os.environ.get("GROUP_RANK", "0")  # hosts may be alike in name
        told = gathered(accelerator, (rank, node, host, leads))
        self._rank, self._leads = rank, leads
        self._others = {r: name for r, other, name, leader in told if leader and other != node}
        self._place: Path | None = None
        self._count, self._last = 0, float("-inf")
        self._heard: dict[int, tuple[str, float]] = {}

    @property
    def several(self) -> bool:
        """Whether there are other hosts."""
        return bool(self._others)

    def begin(self, folder: Path) -> None:
        """Beat in ``folder`` from now on."""
        self._place = folder
        now = time.monotonic()
        self._heard = dict.fromkeys(self._others, ("", now))

    def beat(self) -> None:
        """Say that this host is there, if it is time to."""
        now = time.monotonic()
        if not self.several or not self._leads or self._place is None or now - self._last < BEAT_SECONDS:
            return
        self._count, self._last = self._count + 1, now
        with suppress(OSError):  # a full disk is not the end; the others find out if it lasts
            self._place.mkdir(parents=True, exist_ok=True)
            (self._place / f"pulse{self._rank}").write_text(str(self._count), encoding="ascii")

    def lost(self) -> str | None:
        """Which host is gone, in words, None while all are heard of. By this host's clock alone."""
        now = time.monotonic()
        for rank, host in self._others.items():
            before, since = self._heard[rank]
            found = _read(self._place, rank)
            if found != before:
                self._heard[rank] = found, now
            elif now - since > LOST_SECONDS:
                return f"process {rank} on {host} is gone: nothing was heard of its host for {LOST_SECONDS:.0f} s"
        return None


def _read(place: Path | None, rank: int) -> str:
    with suppress(OSError):
        return (place / f"pulse{rank}").read_text(encoding="ascii") if place else ""
    return ""
