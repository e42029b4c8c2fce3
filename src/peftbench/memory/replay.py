"""Replay simulated allocations through the device's allocator: live, allocated and reserved bytes of each phase."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.memory.allocator import CachingAllocator, CpuPages
from peftbench.memory.plan import PhasePeak
from peftbench.profiler.memory_breakdown import MEMORY_CATEGORIES, MemoryEvent

if TYPE_CHECKING:
    from peftbench.memory.simulation.device import DeviceType

INFERENCE_PHASES = frozenset({"evaluate", "generate"})
"""Phases before which a run empties the allocator's cache, as the Probe does."""


@dataclass(frozen=True)
class AllocatorReplay:
    """Memory of one process on one device over a run."""

    peak_by_phase: dict[str, PhasePeak]
    reserved_bytes: int
    """Peak of what the allocator reserves from the driver."""

    @property
    def peak_phase(self) -> str:
        """The phase with the most allocated bytes."""
        return max(self.peak_by_phase, key=lambda phase: self.peak_by_phase[phase].allocated_bytes)

    @property
    def peak(self) -> PhasePeak:
        """The peak of that phase."""
        return self.peak_by_phase[self.peak_phase]


def replay_allocator(
    events: Iterable[MemoryEvent], device_type: DeviceType = "cuda", capacity: int | None = None
) -> AllocatorReplay:
    """Replay ``events`` through the model of the device's allocator.

    Raises:
        OutOfMemoryError: the driver's ``capacity`` is too small.
    """
    allocator = CachingAllocator(capacity) if device_type == "cuda" else CpuPages(capacity)
    live: dict[str, int] = dict.fromkeys(MEMORY_CATEGORIES, 0)
    peaks: dict[str, tuple[int, dict[str, int], str]] = {}
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
            best = peaks.get(event.step_part)
            if best is None or allocator.allocated_bytes > best[0]:
                peaks[event.step_part] = allocator.allocated_bytes, {**live}, event.operation
    return AllocatorReplay(
        {
            name: PhasePeak(
                live_bytes=sum(by_category.values()),
                allocated_bytes=allocated,
                live_bytes_by_category={category: nbytes for category, nbytes in by_category.items() if nbytes},
                operation=operation,
            )
            for name, (allocated, by_category, operation) in peaks.items()
        },
        allocator.peak_reserved_bytes,
    )
