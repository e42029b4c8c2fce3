"""A book replayed: peaks by part, and what the allocator reserves over a whole run."""

from __future__ import annotations

import pytest

from peftbench.memory.allocator import MIB, OutOfMemoryError
from peftbench.memory.replay import replay_allocator
from peftbench.profiler.memory_breakdown import MemoryEvent

WEIGHTS = MemoryEvent(0, 12 * MIB, True, "weights", "", None, False)


def held(storage: int, size: int, part: str) -> list[MemoryEvent]:
    """A storage that is made and released."""
    return [MemoryEvent(storage, size * MIB, made, "activations", "aten.mm", part, True) for made in (True, False)]


def test_peaks_by_part_and_kind() -> None:
    """Each part has its own, with what was there before it; the largest is the run's."""
    found = replay_allocator([WEIGHTS, *held(1, 30, "forward"), *held(2, 20, "backward")])
    assert {name: moment.live_bytes for name, moment in found.peak_by_phase.items()} == {
        "forward": 42 * MIB,
        "backward": 32 * MIB,
    }
    assert found.peak.phase == "forward"
    assert (found.peak.live_bytes_by_category["weights"], found.peak.live_bytes_by_category["activations"]) == (
        12 * MIB,
        30 * MIB,
    )


def test_the_cache_is_given_back_between_phases() -> None:
    """As a run does: the 30 MiB of training do not stand beside the 40 of evaluation; within training they would."""
    assert replay_allocator([WEIGHTS, *held(1, 30, "forward"), *held(2, 40, "evaluate")]).reserved_bytes == 52 * MIB
    assert replay_allocator([WEIGHTS, *held(1, 30, "forward"), *held(2, 40, "backward")]).reserved_bytes == 82 * MIB


def test_a_capacity_that_is_not_enough() -> None:
    """Says so, once nothing cached is left to give back."""
    events = [WEIGHTS, *held(1, 30, "forward"), *held(2, 40, "backward")]
    assert replay_allocator(events, capacity=52 * MIB).reserved_bytes == 52 * MIB
    with pytest.raises(OutOfMemoryError):
        replay_allocator(events, capacity=50 * MIB)
