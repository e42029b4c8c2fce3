"""A model of torch's caching allocator on CUDA: what it reserves from the driver for a given series of requests.

Source: torch's c10/cuda/CUDACachingAllocator.cpp, its default settings (one stream, no expandable segments, no largest
size to split). Requests are rounded to 512 bytes and served from the smallest free block that is large enough; what is
left of a block is split off where that is worth it, and a block that is freed joins its free neighbours. Where no block
is large enough a segment is taken from the driver: 2 MiB for small requests, 20 MiB for middle ones, for large ones as
much as is asked for in whole 2 MiB. Segments are given back only when the driver has no more.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

MIB = 2**20
MIN_BLOCK_SIZE = 512
"""All sizes are multiples of this."""
SMALL_SIZE = MIB
"""Largest request that is served from the pool of small blocks."""
SMALL_BUFFER = 2 * MIB
MIN_LARGE_ALLOC = 10 * MIB
"""Smallest request that gets a segment of its own size."""
LARGE_BUFFER = 20 * MIB
ROUND_LARGE = 2 * MIB
"""Segments of large requests are multiples of this."""


@dataclass(eq=False)
class _Block:
    """A piece of a segment, with the pieces around it."""

    address: int
    size: int
    is_small: bool
    is_allocated: bool = False
    prev: _Block | None = None
    next: _Block | None = None

    @property
    def sort_key(self) -> tuple[int, int]:
        return self.size, self.address


@dataclass
class _BlockPool:
    """Free blocks, the smallest first and among equals the one of the lowest address."""

    blocks: list[_Block] = field(default_factory=list)

    def add(self, block: _Block) -> None:
        bisect.insort(self.blocks, block, key=lambda b: b.sort_key)

    def remove(self, block: _Block) -> None:
        index = bisect.bisect_left(self.blocks, block.sort_key, key=lambda b: b.sort_key)
        del self.blocks[index]

    def pop_best_fit(self, size: int) -> _Block | None:
        """The smallest block of at least ``size``, no more in the pool."""
        index = bisect.bisect_left(self.blocks, (size, -1), key=lambda b: b.sort_key)
        return self.blocks.pop(index) if index < len(self.blocks) else None


class OutOfMemoryError(Exception):
    """The driver has no more to give."""

    def __init__(self, requested_bytes: int) -> None:
        super().__init__(f"{requested_bytes} bytes")
        self.requested_bytes = requested_bytes


class CachingAllocator:
    """Replays requests; ``capacity`` is what the driver has to give, None for as much as is asked for."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated_bytes = self.reserved_bytes = self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.num_alloc_retries = 0
        """How often cached segments were given back because the driver had no more."""
        self._pools = {True: _BlockPool(), False: _BlockPool()}
        self._live_blocks: dict[int, _Block] = {}
        self._next_address = 0

    def allocate(self, storage_id: int, size: int) -> None:
        """Serve a request of ``size`` bytes, to be freed under ``name``.

        Raises:
            OutOfMemoryError: the driver has no more, even after all cached segments were given back.
        """
        if size == 0:
            return
        rounded = max(MIN_BLOCK_SIZE, -(-size // MIN_BLOCK_SIZE) * MIN_BLOCK_SIZE)
        small = rounded <= SMALL_SIZE
        block = self._pools[small].pop_best_fit(rounded) or self._allocate_segment(rounded, small)
        left = block.size - rounded
        if left >= MIN_BLOCK_SIZE if small else left > SMALL_SIZE:
            rest = _Block(block.address + rounded, left, small, prev=block, next=block.next)
            if block.next is not None:
                block.next.prev = rest
            block.next, block.size = rest, rounded
            self._pools[small].add(rest)
        block.is_allocated = True
        self._live_blocks[storage_id] = block
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def free(self, storage_id: int) -> None:
        """Take back what was served under ``name``."""
        block = self._live_blocks.pop(storage_id, None)
        if block is None:  # of no bytes
            return
        self.allocated_bytes -= block.size
        block.is_allocated = False
        pool = self._pools[block.is_small]
        for other in (block.prev, block.next):
            if other is not None and not other.is_allocated:
                pool.remove(other)
                block = _merge_blocks(*sorted((block, other), key=lambda b: b.address))
        pool.add(block)

    def empty_cache(self) -> None:
        """Return every segment of which nothing is used to the driver, as ``torch.cuda.empty_cache`` does."""
        for pool in self._pools.values():
            whole = [block for block in pool.blocks if block.prev is None and block.next is None]
            for block in whole:
                pool.remove(block)
                self.reserved_bytes -= block.size

    def _allocate_segment(self, size: int, is_small: bool) -> _Block:
        segment = SMALL_BUFFER if is_small else LARGE_BUFFER
        if not is_small and size >= MIN_LARGE_ALLOC:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.capacity is not None and self.reserved_bytes + segment > self.capacity:
            self.num_alloc_retries += 1
            self.empty_cache()
            if self.reserved_bytes + segment > self.capacity:
                raise OutOfMemoryError(size)
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        made = _Block(self._next_address, segment, is_small)
        self._next_address += segment
        return made


class CpuPages:
    """The CPU's, as a run under a budget sets it up: each block is taken from the system in pages and given back."""

    PAGE_SIZE = 4096
    MMAP_THRESHOLD = 64 * 2**10
    """Bytes from which on a block has pages of its own; smaller ones share theirs."""
    MMAP_HEADER = 80
    """What the C library puts before a block of its own pages that is aligned to 64 bytes, as torch's are."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated_bytes = self.peak_reserved_bytes = 0
        self._live_bytes: dict[int, int] = {}

    def allocate(self, storage_id: int, size: int) -> None:
        """Take ``size`` bytes, to be freed under ``name``.

        Raises:
            OutOfMemoryError: the system has no more.
        """
        pages = size if size < self.MMAP_THRESHOLD else -(-(size + self.MMAP_HEADER) // self.PAGE_SIZE) * self.PAGE_SIZE
        if self.capacity is not None and self.allocated_bytes + pages > self.capacity:
            raise OutOfMemoryError(size)
        self._live_bytes[storage_id] = pages
        self.allocated_bytes += pages
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.allocated_bytes)

    def free(self, storage_id: int) -> None:
        """Give back what was taken under ``name``."""
        self.allocated_bytes -= self._live_bytes.pop(storage_id, 0)

    def empty_cache(self) -> None:
        """Nothing is cached."""


def _merge_blocks(first: _Block, second: _Block) -> _Block:
    """Two neighbours as one block."""
    first.size += second.size
    first.next = second.next
    if second.next is not None:
        second.next.prev = first
    return first
