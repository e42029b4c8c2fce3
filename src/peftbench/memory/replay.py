"""From a rehearsal to bytes: live, allocated and reserved, by kind and by part of the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.memory.allocator import CachingAllocator, CpuPages
from peftbench.profiler.memory_breakdown import MEMORY_CATEGORIES, MemoryEvent

if TYPE_CHECKING:
    from peftbench.memory.simulation.device import DeviceType

INFERENCE_PHASES = frozenset({"evaluate", "generate"})
"""Parts before which a run gives back what the allocator has cached, as the Probe does between phases."""


@dataclass(frozen=True)
class PeakUsage:
    """What is held at the peak of a part of a run."""

    live_bytes: int
    """Sizes of tensors."""
    allocated_bytes: int
    """What the allocator gives for them: sizes in its own grain, and what it does not split off."""
    live_bytes_by_category: dict[str, int]
    operation: str
    phase: str


@dataclass(frozen=True)
class AllocatorReplay:
    """Of one process's run on one device."""

    peak_by_phase: dict[str, PeakUsage]
    reserved_bytes: int
    """The most that the allocator takes from the driver."""

    @property
    def peak(self) -> PeakUsage:
        """The part that holds most."""
        return max(self.peak_by_phase.values(), key=lambda moment: moment.allocated_bytes)


def replay_allocator(
    events: Iterable[MemoryEvent], device_type: DeviceType = "cuda", capacity: int | None = None
) -> AllocatorReplay:
    """Replay a book through the model of the device's allocator.

    Raises:
        OutOfMemoryError: the driver's ``capacity`` is not enough.
    """
    allocator = CachingAllocator(capacity) if device_type == "cuda" else CpuPages(capacity)
    live: dict[str, int] = dict.fromkeys(MEMORY_CATEGORIES, 0)
    moments: dict[str, PeakUsage] = {}
    phase: str | None = None
    for event in events:
        if event.step_part in INFERENCE_PHASES and event.step_part != phase:
            allocator.empty_cache()
            phase = event.step_part
        if event.is_allocation:
            allocator.allocate(event.storage_id, event.nbytes)
        else:
            allocator.free(event.storage_id)
        live[event.category] += event.nbytes if event.is_allocation else -event.nbytes
        if event.is_allocation and event.is_after_mark and event.step_part is not None:
            best = moments.get(event.step_part)
            if best is None or allocator.allocated_bytes > best.allocated_bytes:
                moments[event.step_part] = PeakUsage(
                    sum(live.values()), allocator.allocated_bytes, {**live}, event.operation, event.step_part
                )
    return AllocatorReplay(moments, allocator.peak_reserved_bytes)
