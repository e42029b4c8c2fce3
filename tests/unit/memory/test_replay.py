"""Replay of memory events: the peak of each phase, and the bytes that the allocator reserves in a run."""

from __future__ import annotations

import pytest

from peftbench.memory.allocator import MIB, OutOfMemoryError
from peftbench.memory.replay import replay_allocator
from peftbench.profiler.memory_breakdown import MemoryEvent

WEIGHTS = MemoryEvent(0, 12 * MIB, True, "weights", "", None, False)


def allocate_and_free(storage: int, size: int, part: str) -> list[MemoryEvent]:
    """Return the events of a storage that is allocated and released."""
    return [
        MemoryEvent(storage, size * MIB, is_allocation, "activations", "aten.mm", part, True)
        for is_allocation in (True, False)
    ]


def test_peak_of_each_phase_by_category() -> None:
    """A phase's peak includes earlier storages; the largest is the run's peak."""
    replay = replay_allocator([WEIGHTS, *allocate_and_free(1, 30, "forward"), *allocate_and_free(2, 20, "backward")])
    assert {name: peak.live_bytes for name, peak in replay.peak_by_phase.items()} == {
        "forward": 42 * MIB,
        "backward": 32 * MIB,
    }
    assert replay.peak_phase == "forward"
    assert (replay.peak.live_bytes_by_category["weights"], replay.peak.live_bytes_by_category["activations"]) == (
        12 * MIB,
        30 * MIB,
    )


def test_cache_is_emptied_before_evaluation() -> None:
    """The 30 MiB cached in training are released before the 40 MiB of evaluation, but not within training."""
    assert (
        replay_allocator(
            [WEIGHTS, *allocate_and_free(1, 30, "forward"), *allocate_and_free(2, 40, "evaluate")]
        ).reserved_bytes
        == 52 * MIB
    )
    assert (
        replay_allocator(
            [WEIGHTS, *allocate_and_free(1, 30, "forward"), *allocate_and_free(2, 40, "backward")]
        ).reserved_bytes
        == 82 * MIB
    )


def test_insufficient_capacity_raises_out_of_memory() -> None:
    """The cache is released first; then the replay runs out of memory."""
    events = [WEIGHTS, *allocate_and_free(1, 30, "forward"), *allocate_and_free(2, 40, "backward")]
    assert replay_allocator(events, capacity=52 * MIB).reserved_bytes == 52 * MIB
    with pytest.raises(OutOfMemoryError):
        replay_allocator(events, capacity=50 * MIB)
