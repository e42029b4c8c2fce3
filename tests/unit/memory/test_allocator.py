"""The model of CUDA's caching allocator against cases worked by hand from its source."""

from __future__ import annotations

import random

import pytest

from peftbench.memory.allocator import MIB, MIN_BLOCK_SIZE, CachingAllocator, OutOfMemoryError


def test_small_requests_share_a_segment() -> None:
    """Rounded to 512 bytes, cut from 2 MiB."""
    made = CachingAllocator()
    made.allocate(1, 1)
    made.allocate(2, 513)
    assert (made.allocated_bytes, made.reserved_bytes) == (512 + 1024, 2 * MIB)
    made.allocate(3, MIB)
    assert (made.allocated_bytes, made.reserved_bytes) == (512 + 1024 + MIB, 2 * MIB)
    made.allocate(4, MIB)  # does not fit beside them
    assert made.reserved_bytes == 4 * MIB


def test_middle_requests_share_twenty() -> None:
    """Above 1 MiB and below 10: from 20 MiB, and what is left is split off where more than 1 MiB is."""
    made = CachingAllocator()
    made.allocate(1, MIB + 1)
    assert (made.allocated_bytes, made.reserved_bytes) == (MIB + MIN_BLOCK_SIZE, 20 * MIB)
    made.allocate(2, 9 * MIB)
    made.allocate(3, 9 * MIB - MIN_BLOCK_SIZE)  # leaves exactly 1 MiB, which is not split off
    assert (made.allocated_bytes, made.reserved_bytes) == (
        MIB + MIN_BLOCK_SIZE + 9 * MIB + 10 * MIB - MIN_BLOCK_SIZE,
        20 * MIB,
    )


def test_large_requests_have_segments_of_their_own() -> None:
    """In whole 2 MiB; what is left of one is used by nobody where it is not more than 1 MiB."""
    made = CachingAllocator()
    made.allocate(1, 11 * MIB)
    assert (made.allocated_bytes, made.reserved_bytes) == (12 * MIB, 12 * MIB)
    made.allocate(2, 10 * MIB + 1)
    assert (made.allocated_bytes, made.reserved_bytes) == (12 * MIB + 10 * MIB + MIN_BLOCK_SIZE, 24 * MIB)


def test_the_smallest_block_that_fits_is_taken() -> None:
    """Of 40, 30 and 20 MiB that are free, a request of 25 takes the 30, and splits 5 off."""
    made = CachingAllocator()
    for name, size in enumerate((40, 30, 20)):
        made.allocate(name, size * MIB)
    for name in range(3):
        made.free(name)
    made.allocate(9, 25 * MIB)
    assert (made.allocated_bytes, made.reserved_bytes) == (25 * MIB, 90 * MIB)
    made.allocate(10, 30 * MIB)  # not in what is left of the 30, so in the 40
    made.allocate(11, 5 * MIB)
    assert made.reserved_bytes == 90 * MIB
    assert made.peak_allocated_bytes == 90 * MIB


def test_free_neighbours_join() -> None:
    """Three of a segment freed in any order are one block again, and an empty segment can be given back."""
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        made = CachingAllocator()
        for name in range(3):
            made.allocate(name, 6 * MIB)
        for name in order:
            made.free(name)
        made.allocate(9, 9 * MIB)
        assert made.reserved_bytes == 20 * MIB
        made.free(9)
        made.empty_cache()
        assert made.reserved_bytes == made.allocated_bytes == 0


def test_fragments_are_not_given_back() -> None:
    """A segment with one byte in use stays."""
    made = CachingAllocator()
    made.allocate(1, 30 * MIB)
    made.free(1)
    made.allocate(2, 4 * MIB)
    made.empty_cache()
    assert made.reserved_bytes == 30 * MIB


def test_before_it_is_refused_the_cache_is_given_back() -> None:
    """As torch does; the refusal says what was asked for."""
    made = CachingAllocator(capacity=100 * MIB)
    made.allocate(1, 60 * MIB)
    made.free(1)
    made.allocate(2, 80 * MIB)
    assert (made.num_alloc_retries, made.reserved_bytes) == (1, 80 * MIB)
    with pytest.raises(OutOfMemoryError) as raised:
        made.allocate(3, 30 * MIB)
    assert raised.value.requested_bytes == 30 * MIB


def test_whatever_the_order_nothing_is_lost() -> None:
    """Random requests: what is allocated is what is held, reserved is never less, and all comes back in the end."""
    drawn = random.Random(0)  # noqa: S311
    made = CachingAllocator()
    held: dict[int, int] = {}
    for name in range(3000):
        if held and drawn.random() < 0.48:
            gone = drawn.choice(list(held))
            made.free(gone)
            del held[gone]
        else:
            size = int(2 ** drawn.uniform(0, 26))
            made.allocate(name, size)
            held[name] = size
        assert sum(held.values()) <= made.allocated_bytes <= made.reserved_bytes
    for name in held:
        made.free(name)
    made.empty_cache()
    assert made.allocated_bytes == made.reserved_bytes == 0
