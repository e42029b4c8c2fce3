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

from peftbench.data.collate import Collator, FlopUnits, MicroBatch, TokenCounts
from peftbench.errors import OutOfRangeError

_READ_CHUNK_SIZE = 1000  # examples at a time, where only their lengths are wanted


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step: this rank's micro-batches, and the counts over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    token_counts: TokenCounts
    model_flop_units: FlopUnits = field(default_factory=FlopUnits)
    """What training on these examples needs."""
    hardware_flop_units: FlopUnits = field(default_factory=FlopUnits)
    """What computing them takes, padding included."""

    @property
    def max_shape(self) -> tuple[int, int]:
        """Most rows and most positions (padded, virtual ones not counted) of this rank's micro-batches."""
        shapes = [micro_batch.input_ids.shape for micro_batch in self.micro_batches]
        return max(rows for rows, _ in shapes), max(width for _, width in shapes)

    def pin_memory(self) -> GlobalBatch:
        """The same in memory that a GPU can fetch it from while it computes."""
        return replace(self, micro_batches=tuple(micro_batch.pin_memory() for micro_batch in self.micro_batches))


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
    global_batch_size: int
    micro_batch_size: int | None
    seed: int
    rank: int = 0
    world_size: int = 1
    num_micro_batches: int | None = None
    """Micro-batches of a rank in one step, cut to be of equal size in tokens; None cuts by ``micro_batch`` examples."""

    def __post_init__(self) -> None:
        check_divisible(self.global_batch_size, self.world_size)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches a rank runs for one step."""
        return (
            self.num_micro_batches
            or compute_micro_batching(self.global_batch_size, self.micro_batch_size, self.world_size)[0]
        )

    @property
    def max_micro_batch_size(self) -> int | None:
        """Most examples in one of them, None where tokens say how many."""
        return (
            None
            if self.num_micro_batches
            else compute_micro_batching(self.global_batch_size, self.micro_batch_size, self.world_size)[1]
        )

    def limited_to_tokens(self, max_tokens: int, steps: int) -> Batches:
        """The same, cut into as few micro-batches as keep each to ``tokens`` positions, in all of so many steps.

        Raises:
            OutOfRangeError: one example alone is longer.
        """
        lengths = [
            len(ids)
            for start in range(0, len(self.dataset), _READ_CHUNK_SIZE)
            for ids in self.dataset[list(range(start, min(start + _READ_CHUNK_SIZE, len(self.dataset))))]["input_ids"]
        ]
        if (longest := self.collator.count_positions([max(lengths)])) > max_tokens:
            raise OutOfRangeError(
                f"train.micro_batch_tokens={max_tokens} is less than the {longest} positions of the longest example alone; "
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
        """Optimizer steps of a run that is given in steps or in epochs."""
        if steps is not None:
            return steps
        # Rounded first: 1.1 epochs of 100 examples are 110, not the 110.00000000000001 of floating point.
        return max(1, math.ceil(round(len(self.dataset) * (epochs or 0) / self.global_batch_size, 6)))

    def sample_indices(self) -> Iterator[int]:
        """Indices of examples without end: one seeded permutation after another."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self.skip_first_batches(0)

    def skip_first_batches(self, num_batches: int) -> Iterator[GlobalBatch]:
        """The global batches that come after the first ``steps``."""
        order = itertools.islice(self.sample_indices(), num_batches * self.global_batch_size, None)
        while True:
            yield self.build_batch([next(order) for _ in range(self.global_batch_size)])

    def build_batch(self, indices: Sequence[int]) -> GlobalBatch:
        """The global batch of these examples."""
        rows = self.dataset[list(indices)]
        examples = list(zip(rows["input_ids"], rows["prompt_tokens"], indices, strict=True))
        if not self.collator.label_padding:
            examples.sort(key=lambda example: len(example[0]))
        mine: list[MicroBatch] = []
        counts, required, executed = TokenCounts(), FlopUnits(), FlopUnits()
        # Neighbours in length go to the ranks of one micro-step, so that no rank waits for another.
        for index, (start, stop) in enumerate(self._split_micro_batches([len(ids) for ids, _, _ in examples])):
            micro_batch = self.collate(examples[start:stop])
            counts += self.collator.count_tokens(micro_batch)
            required += self.collator.model_flop_units(micro_batch)
            executed += self.hardware_flop_units(micro_batch)
            if index % self.world_size == self.rank:
                mine.append(micro_batch)
        return GlobalBatch(tuple(mine), counts, required, executed)

    def collate(self, examples: Sequence[tuple[Sequence[int], int, int]]) -> MicroBatch:
        """A micro-batch of examples, each as token ids, prompt tokens and index."""
        return self.collator.collate(*zip(*examples, strict=True))

    def hardware_flop_units(self, micro_batch: MicroBatch) -> FlopUnits:
        """What computing it takes."""
        return self.collator.hardware_flop_units(micro_batch)

    def _split_micro_batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs of neighbours, as equal as can be: in tokens where those say how many there are, or in examples."""
        parts = self.gradient_accumulation_steps * self.world_size
        if self.num_micro_batches:
            return _split_evenly(lengths, self.collator.count_positions, parts)
        return itertools.pairwise(index * len(lengths) // parts for index in range(parts + 1))


def check_divisible(global_batch_size: int, world_size: int) -> None:
    """Whether every process can have as many examples of a step as the others.

    Raises:
        OutOfRangeError: it cannot.
    """
    if global_batch_size % world_size:
        raise OutOfRangeError(
            f"train.global_batch_size={global_batch_size} cannot be shared by {world_size} processes; "
            f"use a multiple of {world_size}, or another number of processes"
        )


def compute_micro_batching(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """How a process does its share of a step: in how many micro-batches, and of how many examples at most."""
    share = max(1, global_batch_size // world_size)
    accumulation = math.ceil(share / min(micro_batch_size or share, share))
    return accumulation, math.ceil(share / accumulation)


PositionCounter = Callable[[Sequence[int]], int]
"""What a micro-batch of such lengths is computed over; no fewer for an example added."""


def _group_within_limit(
    lengths: Sequence[int], count_positions: PositionCounter, max_positions: int
) -> list[tuple[int, int]]:
    """The fewest runs of neighbours of at most ``limit`` positions each, as (start, stop)."""
    runs, start = [], 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or count_positions(lengths[start : stop + 1]) > max_positions:
            runs.append((start, stop))
            start = stop
    return runs


def _split_evenly(
    lengths: Sequence[int], count_positions: PositionCounter, num_parts: int
) -> Iterator[tuple[int, int]]:
    """``parts`` runs of neighbours, the largest of which has as few positions as can be."""
    low, high = max(count_positions([length]) for length in lengths), count_positions(lengths)
    limit = bisect.bisect_left(
        range(low, high), True, key=lambda limit: len(_group_within_limit(lengths, count_positions, limit)) <= num_parts
    )
    runs = _group_within_limit(lengths, count_positions, low + limit)
    while len(runs) < num_parts:  # a run that is split is no larger
        start, stop = max(runs, key=lambda run: run[1] - run[0])
        runs.remove((start, stop))
        runs += [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
    return iter(sorted(runs))
