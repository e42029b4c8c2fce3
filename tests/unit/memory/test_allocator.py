"""The model of CUDA's caching allocator, compared with cases computed by hand from its source."""

from __future__ import annotations

import random

import pytest

from peftbench.memory.allocator import MIB, MIN_BLOCK_SIZE, CachingAllocator, OutOfMemoryError


def test_small_requests_share_a_segment() -> None:
    """Requests are rounded to 512 bytes and split from a 2 MiB segment."""
    allocator = CachingAllocator()
    allocator.allocate(1, 1)
    allocator.allocate(2, 513)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (512 + 1024, 2 * MIB)
    allocator.allocate(3, MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (512 + 1024 + MIB, 2 * MIB)
    allocator.allocate(4, MIB)  # does not fit in the rest of the segment
    assert allocator.reserved_bytes == 4 * MIB


def test_medium_requests_share_a_20_mib_segment() -> None:
    """Requests of 1 to 10 MiB: a rest of more than 1 MiB is split off."""
    allocator = CachingAllocator()
    allocator.allocate(1, MIB + 1)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (MIB + MIN_BLOCK_SIZE, 20 * MIB)
    allocator.allocate(2, 9 * MIB)
    allocator.allocate(3, 9 * MIB - MIN_BLOCK_SIZE)  # leaves exactly 1 MiB, which is not split off
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (
        MIB + MIN_BLOCK_SIZE + 9 * MIB + 10 * MIB - MIN_BLOCK_SIZE,
        20 * MIB,
    )


def test_large_requests_have_own_segments() -> None:
    """Segments are multiples of 2 MiB; a rest of at most 1 MiB is not split off."""
    allocator = CachingAllocator()
    allocator.allocate(1, 11 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (12 * MIB, 12 * MIB)
    allocator.allocate(2, 10 * MIB + 1)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (12 * MIB + 10 * MIB + MIN_BLOCK_SIZE, 24 * MIB)


def test_smallest_sufficient_block_is_used() -> None:
    """With blocks of 40, 30 and 20 MiB free, a request of 25 MiB uses the block of 30 and splits off 5."""
    allocator = CachingAllocator()
    for name, size in enumerate((40, 30, 20)):
        allocator.allocate(name, size * MIB)
    for name in range(3):
        allocator.free(name)
    allocator.allocate(9, 25 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (25 * MIB, 90 * MIB)
    allocator.allocate(10, 30 * MIB)  # the rest of the 30 MiB block is too small; the 40 MiB block is used
    allocator.allocate(11, 5 * MIB)
    assert allocator.reserved_bytes == 90 * MIB
    assert allocator.peak_allocated_bytes == 90 * MIB


def test_free_neighbors_merge() -> None:
    """Three blocks of a segment, freed in any order, merge into one, and an empty segment can be released."""
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        allocator = CachingAllocator()
        for name in range(3):
            allocator.allocate(name, 6 * MIB)
        for name in order:
            allocator.free(name)
        allocator.allocate(9, 9 * MIB)
        assert allocator.reserved_bytes == 20 * MIB
        allocator.free(9)
        allocator.empty_cache()
        assert allocator.reserved_bytes == allocator.allocated_bytes == 0


def test_partly_used_segment_is_not_released() -> None:
    """empty_cache releases only unused segments."""
    allocator = CachingAllocator()
    allocator.allocate(1, 30 * MIB)
    allocator.free(1)
    allocator.allocate(2, 4 * MIB)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 30 * MIB


def test_cache_is_released_before_out_of_memory() -> None:
    """The cache is released first, as in torch; the error has the requested bytes."""
    allocator = CachingAllocator(capacity=100 * MIB)
    allocator.allocate(1, 60 * MIB)
    allocator.free(1)
    allocator.allocate(2, 80 * MIB)
    assert (allocator.num_alloc_retries, allocator.reserved_bytes) == (1, 80 * MIB)
    with pytest.raises(OutOfMemoryError) as raised:
        allocator.allocate(3, 30 * MIB)
    assert raised.value.requested_bytes == 30 * MIB


def test_random_requests_keep_byte_counts_consistent() -> None:
    """Live <= allocated <= reserved bytes at all times, and all memory is released at the end."""
    generator = random.Random(0)  # noqa: S311
    allocator = CachingAllocator()
    live: dict[int, int] = {}
    for name in range(3000):
        if live and generator.random() < 0.48:
            freed = generator.choice(list(live))
            allocator.free(freed)
            del live[freed]
        else:
            size = int(2 ** generator.uniform(0, 26))
            allocator.allocate(name, size)
            live[name] = size
        assert sum(live.values()) <= allocator.allocated_bytes <= allocator.reserved_bytes
    for name in live:
        allocator.free(name)
    allocator.empty_cache()
    assert allocator.allocated_bytes == allocator.reserved_bytes == 0
