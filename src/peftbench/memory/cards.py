"""Memory sizes of common GPUs, from the device profiles. Imports no torch, so that a report can read it."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from pydantic import BaseModel, ByteSize, ConfigDict

from peftbench.common.filesystem import load_json_resources

_GIB = 2**30
_CLASS_STEP = 4
"""GPUs are sold with multiples of this many GiB, and torch reports less."""
_LARGEST_CLASS = 80
"""The largest size of a common card, in GiB."""


class _Profile(BaseModel):
    """The part of a device profile that limits tensors."""

    model_config = ConfigDict(frozen=True)

    memory: ByteSize | tuple[ByteSize, ByteSize]
    context: tuple[ByteSize, ByteSize]
    workspaces: tuple[ByteSize, ByteSize]

    @property
    def least_memory(self) -> int:
        """The smallest total memory that torch may report."""
        return int(self.memory[0] if isinstance(self.memory, tuple) else self.memory)


class CardSize(NamedTuple):
    """The cards that are sold with the same memory."""

    gigabytes: int
    """Their nominal memory, in GiB."""
    tensor_bytes: int
    """Memory of the smallest of them for torch's allocator, without the largest context and workspaces."""


@cache
def list_card_sizes() -> tuple[CardSize, ...]:
    """Return the sizes of the known cards, smallest first."""
    smallest: dict[int, int] = {}
    for profile in load_json_resources("peftbench.memory", _Profile, "devices").values():
        size = _CLASS_STEP * math.ceil(profile.least_memory / _GIB / _CLASS_STEP)
        room = profile.least_memory - int(profile.context[1]) - int(profile.workspaces[1])
        if 0 < size <= _LARGEST_CLASS:  # a CPU has no memory of its own
            smallest[size] = min(room, smallest.get(size, room))
    return tuple(CardSize(size, smallest[size]) for size in sorted(smallest))


def find_smallest_card(reserved_bytes: int) -> CardSize | None:
    """Return the smallest known card whose allocator can reserve this many bytes; None if none can."""
    return next((card for card in list_card_sizes() if card.tensor_bytes >= reserved_bytes), None)
