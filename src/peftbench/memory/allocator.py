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
    small: bool
    used: bool = False
    before: _Block | None = None
    after: _Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.address


@dataclass
class _BlockPool:
    """Free blocks, the smallest first and among equals the one of the lowest address."""

    blocks: list[_Block] = field(default_factory=list)

    def add(self, block: _Block) -> None:
        bisect.insort(self.blocks, block, key=lambda b: b.key)

    def remove(self, block: _Block) -> None:
        index = bisect.bisect_left(self.blocks, block.key, key=lambda b: b.key)
        del self.blocks[index]

    def take(self, size: int) -> _Block | None:
        """The smallest block of at least ``size``, no more in the pool."""
        index = bisect.bisect_left(self.blocks, (size, -1), key=lambda b: b.key)
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
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        """How often cached segments were given back because the driver had no more."""
        self._pools = {True: _BlockPool(), False: _BlockPool()}
        self._held: dict[int, _Block] = {}
        self._next = 0

    def allocate(self, name: int, size: int) -> None:
        """Serve a request of ``size`` bytes, to be freed under ``name``.

        Raises:
            OutOfMemoryError: the driver has no more, even after all cached segments were given back.
        """
        if size == 0:
            return
        rounded = max(MIN_BLOCK_SIZE, -(-size // MIN_BLOCK_SIZE) * MIN_BLOCK_SIZE)
        small = rounded <= SMALL_SIZE
        block = self._pools[small].take(rounded) or self._segment(rounded, small)
        left = block.size - rounded
        if left >= MIN_BLOCK_SIZE if small else left > SMALL_SIZE:
            rest = _Block(block.address + rounded, left, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, rounded
            self._pools[small].add(rest)
        block.used = True
        self._held[name] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, name: int) -> None:
        """Take back what was served under ``name``."""
        block = self._held.pop(name, None)
        if block is None:  # of no bytes
            return
        self.allocated -= block.size
        block.used = False
        pool = self._pools[block.small]
        for other in (block.before, block.after):
            if other is not None and not other.used:
                pool.remove(other)
                block = _merge_blocks(*sorted((block, other), key=lambda b: b.address))
        pool.add(block)

    def give_back(self) -> None:
        """Return every segment of which nothing is used to the driver, as ``torch.cuda.empty_cache`` does."""
        for pool in self._pools.values():
            whole = [block for block in pool.blocks if block.before is None and block.after is None]
            for block in whole:
                pool.remove(block)
                self.reserved -= block.size

    def _segment(self, size: int, small: bool) -> _Block:
        segment = SMALL_BUFFER if small else LARGE_BUFFER
        if not small and size >= MIN_LARGE_ALLOC:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.capacity is not None and self.reserved + segment > self.capacity:
            self.retries += 1
            self.give_back()
            if self.reserved + segment > self.capacity:
                raise OutOfMemoryError(size)
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        made = _Block(self._next, segment, small)
        self._next += segment
        return made


class CpuPages:
    """The CPU's, as a run under a budget sets it up: each block is taken from the system in pages and given back."""

    PAGE = 4096
    WHOLE = 64 * 2**10
    """Bytes from which on a block has pages of its own; smaller ones share theirs."""
    HEADER = 80
    """What the C library puts before a block of its own pages that is aligned to 64 bytes, as torch's are."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.peak_reserved = 0
        self._held: dict[int, int] = {}

    def allocate(self, name: int, size: int) -> None:
        """Take ``size`` bytes, to be freed under ``name``.

        Raises:
            OutOfMemoryError: the system has no more.
        """
        pages = size if size < self.WHOLE else -(-(size + self.HEADER) // self.PAGE) * self.PAGE
        if self.capacity is not None and self.allocated + pages > self.capacity:
            raise OutOfMemoryError(size)
        self._held[name] = pages
        self.allocated += pages
        self.peak_reserved = max(self.peak_reserved, self.allocated)

    def free(self, name: int) -> None:
        """Give back what was taken under ``name``."""
        self.allocated -= self._held.pop(name, 0)

    def give_back(self) -> None:
        """Nothing is cached."""


def _merge_blocks(first: _Block, second: _Block) -> _Block:
    """Two neighbours as one block."""
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first
