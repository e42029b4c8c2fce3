"""Global batches in one seeded order for every method, micro-batches of similar lengths, and exact token counts.

A global batch is a random sample that does not depend on the number of processes. Examples are sorted by length only
within a global batch, so grouping saves padding and does not change the gradient. Every rank computes the full plan, so
counting the labeled tokens of a global batch needs no communication.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from peftbench.data.collate import Collator, FlopUnits, MicroBatch, TokenCounts
from peftbench.errors import OutOfRangeError

_READ_CHUNK_SIZE = 1000  # examples read at once to get their lengths


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step: this rank's micro-batches, and the counts over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    token_counts: TokenCounts
    model_flop_units: FlopUnits = field(default_factory=FlopUnits)
    """Work of training on these examples without padding, over all ranks."""
    hardware_flop_units: FlopUnits = field(default_factory=FlopUnits)
    """Work of whole forward and backward passes, padding included, over all ranks."""
    skipped_flop_units: FlopUnits = field(default_factory=FlopUnits)
    """The part of ``hardware_flop_units`` that the frozen part skips, because its states are loaded."""

    @property
    def max_shape(self) -> tuple[int, int]:
        """Largest numbers of rows and of positions (padded, without virtual tokens) in this rank's micro-batches."""
        shapes = [micro_batch.input_ids.shape for micro_batch in self.micro_batches]
        return max(rows for rows, _ in shapes), max(width for _, width in shapes)

    @property
    def max_labeled(self) -> int:
        """Most labeled tokens in one of this rank's micro-batches."""
        return max(len(micro_batch.targets) for micro_batch in self.micro_batches)

    def pin_memory(self) -> GlobalBatch:
        """Return a copy in pinned memory, from which a GPU copies asynchronously."""
        return replace(self, micro_batches=tuple(micro_batch.pin_memory() for micro_batch in self.micro_batches))


class EncodedExamples(Protocol):
    """Encoded examples: a :class:`datasets.Dataset` with these two columns, or any object with the same interface."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int], /) -> Mapping[str, Sequence[Any]]:
        """Return ``input_ids`` (lists of token ids) and ``label_spans`` (start, end, start, end, ... of each)."""


@dataclass(frozen=True)
class Batches:
    """The global batches of a run in order, with the micro-batches of one rank."""

    dataset: EncodedExamples
    collator: Collator
    global_batch_size: int
    micro_batch_size: int | None
    seed: int
    rank: int = 0
    world_size: int = 1
    num_micro_batches: int | None = None
    """Micro-batches per rank and step, balanced by tokens; None: split by ``micro_batch_size`` examples."""

    def __post_init__(self) -> None:
        check_divisible(self.global_batch_size, self.world_size)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Number of micro-batches per rank and step."""
        return (
            self.num_micro_batches
            or compute_micro_batching(self.global_batch_size, self.micro_batch_size, self.world_size)[0]
        )

    @property
    def max_micro_batch_size(self) -> int | None:
        """Most examples in a micro-batch; None if micro-batches are split by tokens."""
        return (
            None
            if self.num_micro_batches
            else compute_micro_batching(self.global_batch_size, self.micro_batch_size, self.world_size)[1]
        )

    def limited_to_tokens(self, max_tokens: int, steps: int) -> Batches:
        """Return a copy with the fewest micro-batches of at most ``max_tokens`` positions in each of ``steps`` steps.

        Raises:
            OutOfRangeError: a single example is longer.
        """
        lengths = [
            len(ids)
            for start in range(0, len(self.dataset), _READ_CHUNK_SIZE)
            for ids in self.dataset[list(range(start, min(start + _READ_CHUNK_SIZE, len(self.dataset))))]["input_ids"]
        ]
        if (longest := self.collator.count_positions([max(lengths)])) > max_tokens:
            raise OutOfRangeError(
                f"train.micro_batch_tokens={max_tokens} is less than the {longest} positions of the longest example; "
                f"set it to {longest} or more, or lower data.max_length"
            )
        order, most = self.sample_indices(), 1
        for _ in range(steps):
            drawn = sorted(lengths[next(order)] for _ in range(self.global_batch_size))
            most = max(
                most,
                math.ceil(len(_group_within_limit(drawn, self.collator.count_positions, max_tokens)) / self.world_size),
            )
        return replace(self, num_micro_batches=min(most, self.global_batch_size // self.world_size))

    def count_steps(self, steps: int | None, epochs: float | None) -> int:
        """Return the number of optimizer steps from ``steps`` or ``epochs``."""
        if steps is not None:
            return steps
        # Rounded first: in floating point, 1.1 epochs of 100 examples are 110.00000000000001.
        return max(1, math.ceil(round(len(self.dataset) * (epochs or 0) / self.global_batch_size, 6)))

    def sample_indices(self) -> Iterator[int]:
        """Yield indices of examples forever: one seeded permutation after another."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self.skip_first_batches(0)

    def skip_first_batches(self, num_batches: int) -> Iterator[GlobalBatch]:
        """Yield the global batches after the first ``num_batches``."""
        order = itertools.islice(self.sample_indices(), num_batches * self.global_batch_size, None)
        while True:
            yield self.build_batch([next(order) for _ in range(self.global_batch_size)])

    def build_batch(self, indices: Sequence[int]) -> GlobalBatch:
        """Build the global batch of these examples."""
        rows = self.dataset[list(indices)]
        examples = list(zip(rows["input_ids"], rows["label_spans"], indices, strict=True))
        if not self.collator.label_padding:
            examples.sort(key=lambda example: len(example[0]))
        local_batches: list[MicroBatch] = []
        counts, required, executed, skipped = TokenCounts(), FlopUnits(), FlopUnits(), FlopUnits()
        # Micro-batches of similar length go to the ranks at the same time, so that no rank waits for another.
        for index, (start, stop) in enumerate(self._split_micro_batches([len(ids) for ids, _, _ in examples])):
            micro_batch = self.collate(examples[start:stop])
            counts += self.collator.count_tokens(micro_batch)
            required += self.collator.model_flop_units(micro_batch)
            executed += self.hardware_flop_units(micro_batch)
            skipped += self.skipped_flop_units(micro_batch)
            if index % self.world_size == self.rank:
                local_batches.append(micro_batch)
        return GlobalBatch(tuple(local_batches), counts, required, executed, skipped)

    def collate(self, examples: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> MicroBatch:
        """Collate examples, each given as token ids, label spans and index."""
        return self.collator.collate(*zip(*examples, strict=True))

    def hardware_flop_units(self, micro_batch: MicroBatch) -> FlopUnits:
        """Return the work of a whole forward and backward pass of this micro-batch."""
        return self.collator.hardware_flop_units(micro_batch)

    def skipped_flop_units(self, micro_batch: MicroBatch) -> FlopUnits:
        """Return the part of that work that the frozen part skips: none without a feature cache."""
        return FlopUnits()

    def _split_micro_batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Split into ranges that are balanced by tokens if ``num_micro_batches`` is set, else by examples."""
        parts = self.gradient_accumulation_steps * self.world_size
        if self.num_micro_batches:
            return _split_evenly(lengths, self.collator.count_positions, parts)
        return itertools.pairwise(index * len(lengths) // parts for index in range(parts + 1))


def check_divisible(global_batch_size: int, world_size: int) -> None:
    """Check that every process gets the same number of examples per step.

    Raises:
        OutOfRangeError: the global batch is not divisible.
    """
    if global_batch_size % world_size:
        raise OutOfRangeError(
            f"train.global_batch_size={global_batch_size} is not divisible by {world_size} processes; "
            f"use a multiple of {world_size}, or another number of processes"
        )


def compute_micro_batching(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Return the number of micro-batches per process and step, and the most examples in one of them."""
    share = max(1, global_batch_size // world_size)
    accumulation = math.ceil(share / min(micro_batch_size or share, share))
    return accumulation, math.ceil(share / accumulation)


PositionCounter = Callable[[Sequence[int]], int]
"""Positions of a micro-batch with these lengths; must not decrease when an example is added."""


def _group_within_limit(
    lengths: Sequence[int], count_positions: PositionCounter, max_positions: int
) -> list[tuple[int, int]]:
    """Return the fewest consecutive ranges (start, stop) of at most ``max_positions`` positions each."""
    runs, start = [], 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or count_positions(lengths[start : stop + 1]) > max_positions:
            runs.append((start, stop))
            start = stop
    return runs


def _split_evenly(
    lengths: Sequence[int], count_positions: PositionCounter, num_parts: int
) -> Iterator[tuple[int, int]]:
    """Yield ``num_parts`` consecutive ranges whose largest has as few positions as possible."""
    low, high = max(count_positions([length]) for length in lengths), count_positions(lengths)
    limit = bisect.bisect_left(
        range(low, high), True, key=lambda limit: len(_group_within_limit(lengths, count_positions, limit)) <= num_parts
    )
    runs = _group_within_limit(lengths, count_positions, low + limit)
    while len(runs) < num_parts:  # splitting a range does not make it larger
        start, stop = max(runs, key=lambda run: run[1] - run[0])
        runs.remove((start, stop))
        runs += [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
    return iter(sorted(runs))
