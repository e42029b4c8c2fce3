"""From a rehearsal to bytes: live, allocated and reserved, by kind and by part of the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peftbench.budget.allocator import CachingAllocator
from peftbench.profiler.breakdown import KINDS, Event


@dataclass(frozen=True)
class Moment:
    """What is held at the peak of a step or of a part of it."""

    live_bytes: int
    """Sizes of tensors."""
    allocated_bytes: int
    """What the allocator gives for them: sizes in its own grain, and what it does not split off."""
    live_by_kind: dict[str, int]
    operation: str
    part: str | None


@dataclass(frozen=True)
class Forecast:
    """Of one process's training on one device."""

    peak: Moment
    by_part: dict[str, Moment]
    """The peak of each part of a step."""
    reserved_bytes: int
    """What the allocator takes from the driver."""


def forecast(events: Iterable[Event]) -> Forecast:
    """Replay a book through the model of CUDA's allocator."""
    allocator = CachingAllocator()
    live = dict.fromkeys(KINDS, 0)
    moments: dict[str | None, Moment] = {}
    for event in events:
        if event.made:
            allocator.allocate(event.storage, event.bytes)
        else:
            allocator.free(event.storage)
        live[event.kind] += event.bytes if event.made else -event.bytes
        if event.made and event.looked_at:
            best = moments.get(event.part)
            if best is None or allocator.allocated > best.allocated_bytes:
                total = sum(live.values())
                moments[event.part] = Moment(total, allocator.allocated, {**live}, event.operation, event.part)
    peak = max(moments.values(), key=lambda moment: moment.allocated_bytes)
    by_part = {part: moment for part, moment in moments.items() if part is not None}
    return Forecast(peak, by_part, allocator.peak_reserved)
