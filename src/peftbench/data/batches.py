"""Batches: one seeded order for every method, micro-batches of like lengths, and exact token counts.

A global batch is a plain random draw, whatever the number of processes; only inside it are examples sorted by length
and cut into micro-batches, so grouping saves padding and changes no gradient. All ranks know the whole plan, so the
number of labelled tokens of a global batch needs no communication.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from peftbench.data.collate import Collator, MicroBatch, TokenCounts, FlopUnits
from peftbench.errors import OutOfRangeError

_READ_CHUNK_SIZE = 1000  # examples at a time, where only their lengths are wanted


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step: this rank's micro-batches, and the counts over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    counts: TokenCounts
    required: FlopUnits = field(default_factory=FlopUnits)
    """What training on these examples needs."""
    executed: FlopUnits = field(default_factory=FlopUnits)
    """What computing them takes, padding included."""

    @property
    def shape(self) -> tuple[int, int]:
        """Most rows and most positions (padded, virtual ones not counted) of this rank's micro-batches."""
        shapes = [micro_batch.input_ids.shape for micro_batch in self.micro_batches]
        return max(rows for rows, _ in shapes), max(width for _, width in shapes)

    def pinned(self) -> GlobalBatch:
        """The same in memory that a GPU can fetch it from while it computes."""
        return replace(self, micro_batches=tuple(micro_batch.pinned() for micro_batch in self.micro_batches))


class EncodedExamples(Protocol):
    """Encoded examples: a :class:`datasets.Dataset` with these two columns, or anything that answers alike."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int], /) -> Mapping[str, Sequence[Any]]:
        """``input_ids`` (lists of token ids) and ``prompt_tokens`` (how many of each are not labelled)."""


@dataclass(frozen=True)
class Batches:
    """The global batches of a run, in order, as one rank sees them."""

    dataset: EncodedExamples
    collator: Collator
    global_batch: int
    micro_batch: int | None
    seed: int
    rank: int = 0
    world_size: int = 1
    micro_batches: int | None = None
    """Micro-batches of a rank in one step, cut to be of equal size in tokens; None cuts by ``micro_batch`` examples."""

    def __post_init__(self) -> None:
        check_divisible(self.global_batch, self.world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank runs for one step."""
        return self.micro_batches or compute_micro_batching(self.global_batch, self.micro_batch, self.world_size)[0]

    @property
    def largest_micro_batch(self) -> int | None:
        """Most examples in one of them, None where tokens say how many."""
        return None if self.micro_batches else compute_micro_batching(self.global_batch, self.micro_batch, self.world_size)[1]

    def within(self, tokens: int, steps: int) -> Batches:
        """The same, cut into as few micro-batches as keep each to ``tokens`` positions, in all of so many steps.

        Raises:
            OutOfRangeError: one example alone is longer.
        """
        lengths = [
            len(ids)
            for start in range(0, len(self.dataset), _READ_CHUNK_SIZE)
            for ids in self.dataset[list(range(start, min(start + _READ_CHUNK_SIZE, len(self.dataset))))]["input_ids"]
        ]
        if (longest := self.collator.positions([max(lengths)])) > tokens:
            raise OutOfRangeError(
                f"train.micro_batch_tokens={tokens} is less than the {longest} positions of the longest example alone; "
                f"set it to {longest} or more, or lower data.max_length"
            )
        order, most = self.order(), 1
        for _ in range(steps):
            drawn = sorted(lengths[next(order)] for _ in range(self.global_batch))
            most = max(most, math.ceil(len(_group_within_limit(drawn, self.collator.positions, tokens)) / self.world_size))
        return replace(self, micro_batches=min(most, self.global_batch // self.world_size))

    def steps(self, steps: int | None, epochs: float | None) -> int:
        """Optimizer steps of a run that is given in steps or in epochs."""
        if steps is not None:
            return steps
        # Rounded first: 1.1 epochs of 100 examples are 110, not the 110.00000000000001 of floating point.
        return max(1, math.ceil(round(len(self.dataset) * (epochs or 0) / self.global_batch, 6)))

    def order(self) -> Iterator[int]:
        """Indices of examples without end: one seeded permutation after another."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self.after(0)

    def after(self, steps: int) -> Iterator[GlobalBatch]:
        """The global batches that come after the first ``steps``."""
        order = itertools.islice(self.order(), steps * self.global_batch, None)
        while True:
            yield self.batch([next(order) for _ in range(self.global_batch)])

    def batch(self, indices: Sequence[int]) -> GlobalBatch:
        """The global batch of these examples."""
        rows = self.dataset[list(indices)]
        examples = list(zip(rows["input_ids"], rows["prompt_tokens"], indices, strict=True))
        if not self.collator.as_published:
            examples.sort(key=lambda example: len(example[0]))
        mine: list[MicroBatch] = []
        counts, required, executed = TokenCounts(), FlopUnits(), FlopUnits()
        # Neighbours in length go to the ranks of one micro-step, so that no rank waits for another.
        for index, (start, stop) in enumerate(self._cut([len(ids) for ids, _, _ in examples])):
            micro_batch = self.collate(examples[start:stop])
            counts += self.collator.count(micro_batch)
            required += self.collator.required(micro_batch)
            executed += self.executed(micro_batch)
            if index % self.world_size == self.rank:
                mine.append(micro_batch)
        return GlobalBatch(tuple(mine), counts, required, executed)

    def collate(self, examples: Sequence[tuple[Sequence[int], int, int]]) -> MicroBatch:
        """A micro-batch of examples, each as token ids, prompt tokens and index."""
        return self.collator.collate(*zip(*examples, strict=True))

    def executed(self, micro_batch: MicroBatch) -> FlopUnits:
        """What computing it takes."""
        return self.collator.executed(micro_batch)

    def _cut(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs of neighbours, as equal as can be: in tokens where those say how many there are, or in examples."""
        parts = self.accumulation * self.world_size
        if self.micro_batches:
            return _split_evenly(lengths, self.collator.positions, parts)
        return itertools.pairwise(index * len(lengths) // parts for index in range(parts + 1))


def check_divisible(global_batch: int, world_size: int) -> None:
    """Whether every process can have as many examples of a step as the others.

    Raises:
        OutOfRangeError: it cannot.
    """
    if global_batch % world_size:
        raise OutOfRangeError(
            f"train.global_batch_size={global_batch} cannot be shared by {world_size} processes; "
            f"use a multiple of {world_size}, or another number of processes"
        )


def compute_micro_batching(global_batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """How a process does its share of a step: in how many micro-batches, and of how many examples at most."""
    share = max(1, global_batch // world_size)
    accumulation = math.ceil(share / min(micro_batch or share, share))
    return accumulation, math.ceil(share / accumulation)


PositionCounter = Callable[[Sequence[int]], int]
"""What a micro-batch of such lengths is computed over; no fewer for an example added."""


def _group_within_limit(lengths: Sequence[int], positions: PositionCounter, limit: int) -> list[tuple[int, int]]:
    """The fewest runs of neighbours of at most ``limit`` positions each, as (start, stop)."""
    runs, start = [], 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or positions(lengths[start : stop + 1]) > limit:
            runs.append((start, stop))
            start = stop
    return runs


def _split_evenly(lengths: Sequence[int], positions: PositionCounter, parts: int) -> Iterator[tuple[int, int]]:
    """``parts`` runs of neighbours, the largest of which has as few positions as can be."""
    low, high = max(positions([length]) for length in lengths), positions(lengths)
    limit = bisect.bisect_left(range(low, high), True, key=lambda limit: len(_group_within_limit(lengths, positions, limit)) <= parts)
    runs = _group_within_limit(lengths, positions, low + limit)
    while len(runs) < parts:  # a run that is split is no larger
        start, stop = max(runs, key=lambda run: run[1] - run[0])
        runs.remove((start, stop))
        runs += [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
    return iter(sorted(runs))
