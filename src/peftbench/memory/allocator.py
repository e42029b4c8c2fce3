"""Model torch's caching allocator on CUDA: the bytes that it reserves from the driver for a series of requests.

Source: torch's c10/cuda/CUDACachingAllocator.cpp with default settings (one stream, no expandable segments, no
max_split_size). A request is rounded up to 512 bytes and served from the smallest free block that is large enough. The
rest of the block is split off if it is large enough, and a freed block merges with its free neighbors. If no block is
large enough, a segment is requested from the driver: 2 MiB for small requests, 20 MiB for medium requests, and a
multiple of 2 MiB for large ones. Segments are returned only when the driver has no memory left.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

MIB = 2**20
MIN_BLOCK_SIZE = 512
"""Block sizes are multiples of this."""
SMALL_SIZE = MIB
"""Largest request served from the pool of small blocks."""
SMALL_BUFFER = 2 * MIB
MIN_LARGE_ALLOC = 10 * MIB
"""Smallest request that gets a segment of its own size."""
LARGE_BUFFER = 20 * MIB
ROUND_LARGE = 2 * MIB
"""Segments of large requests are multiples of this."""


@dataclass(eq=False)
class _Block:
    """A part of a segment, linked to its neighbors."""

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
    """Free blocks, sorted by size and then by address."""

    blocks: list[_Block] = field(default_factory=list)

    def add(self, block: _Block) -> None:
        bisect.insort(self.blocks, block, key=lambda b: b.sort_key)

    def remove(self, block: _Block) -> None:
        index = bisect.bisect_left(self.blocks, block.sort_key, key=lambda b: b.sort_key)
        del self.blocks[index]

    def pop_best_fit(self, size: int) -> _Block | None:
        """Remove and return the smallest block of at least ``size`` bytes, or None."""
        index = bisect.bisect_left(self.blocks, (size, -1), key=lambda b: b.sort_key)
        return self.blocks.pop(index) if index < len(self.blocks) else None


class OutOfMemoryError(Exception):
    """The driver has too little memory left."""

    def __init__(self, requested_bytes: int) -> None:
        super().__init__(f"{requested_bytes} bytes")
        self.requested_bytes = requested_bytes


class CachingAllocator:
    """Replays requests; ``capacity`` is the driver's memory in bytes, None for unlimited."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated_bytes = self.reserved_bytes = self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.num_alloc_retries = 0
        """Number of times that cached segments were released because the driver had no memory left."""
        self._pools = {True: _BlockPool(), False: _BlockPool()}
        self._live_blocks: dict[int, _Block] = {}
        self._next_address = 0

    def allocate(self, storage_id: int, size: int) -> None:
        """Allocate ``size`` bytes for ``storage_id``.

        Raises:
            OutOfMemoryError: the driver has too little memory, even after all cached segments are released.
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
        """Free the block of ``storage_id``."""
        block = self._live_blocks.pop(storage_id, None)
        if block is None:  # an allocation of 0 bytes
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
        """Return unused segments to the driver, like ``torch.cuda.empty_cache``."""
        for pool in self._pools.values():
            unused = [block for block in pool.blocks if block.prev is None and block.next is None]
            for block in unused:
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
        block = _Block(self._next_address, segment, is_small)
        self._next_address += segment
        return block


class CpuPages:
    """Models glibc's malloc as a run under a budget sets it up: each large block is mapped and unmapped in pages."""

    PAGE_SIZE = 4096
    MMAP_THRESHOLD = 64 * 2**10
    """Smallest block with its own pages, in bytes; smaller blocks share pages."""
    MMAP_HEADER = 80
    """Bytes that glibc puts before a mapped block aligned to 64 bytes, as torch aligns its blocks."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated_bytes = self.peak_reserved_bytes = 0
        self._live_bytes: dict[int, int] = {}

    def allocate(self, storage_id: int, size: int) -> None:
        """Allocate ``size`` bytes for ``storage_id``.

        Raises:
            OutOfMemoryError: the system has too little memory.
        """
        pages = size if size < self.MMAP_THRESHOLD else -(-(size + self.MMAP_HEADER) // self.PAGE_SIZE) * self.PAGE_SIZE
        if self.capacity is not None and self.allocated_bytes + pages > self.capacity:
            raise OutOfMemoryError(size)
        self._live_bytes[storage_id] = pages
        self.allocated_bytes += pages
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.allocated_bytes)

    def free(self, storage_id: int) -> None:
        """Free the block of ``storage_id``."""
        self.allocated_bytes -= self._live_bytes.pop(storage_id, 0)

    def empty_cache(self) -> None:
        """Do nothing: no block is cached."""


def _merge_blocks(first: _Block, second: _Block) -> _Block:
    """Merge two neighbors into one block."""
    first.size += second.size
    first.next = second.next
    if second.next is not None:
        second.next.prev = first
    return first
