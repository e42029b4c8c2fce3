"""Batches: one seeded order for every method, micro-batches of like lengths, and exact token counts.

A global batch is a plain random draw, whatever the number of processes; only inside it are examples sorted by length
and cut into micro-batches, so grouping saves padding and changes no gradient. All ranks know the whole plan, so the
number of labelled tokens of a global batch needs no communication.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from peftbench.errors import OutOfRangeError

IGNORED = -100
"""Label of a position that is not to be predicted, as torch's cross-entropy ignores it."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a batch, four kinds that must not be mixed."""

    real: int = 0
    """Tokens of articles, separators, summaries and ends."""
    padded: int = 0
    """Positions computed: real tokens and padding, virtual ones not counted."""
    labelled: int = 0
    """Positions that enter the loss."""
    virtual: int = 0
    """Soft tokens a method puts before the sequences."""

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.real + other.real, self.padded + other.padded,
            self.labelled + other.labelled, self.virtual + other.virtual,
        )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What is computed for sequences, summed over them: all that FLOPs depend on beside the model."""

    positions: int = 0
    """Through the trunk, virtual tokens included."""
    pairs: int = 0
    """Of query and key."""
    head_positions: int = 0
    """Through the output head."""
    columns: int = 0
    """Width of each micro-batch, once: what rotary embeddings are computed for."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.positions + other.positions, self.pairs + other.pairs,
            self.head_positions + other.head_positions, self.columns + other.columns,
        )  # fmt: skip


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, padded at the right: three integer tensors of shape (rows, longest)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on ``device``."""
        return MicroBatch(
            *(t.to(device, non_blocking=True) for t in (self.input_ids, self.attention_mask, self.labels))
        )


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step: this rank's micro-batches, and the counts over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    counts: TokenCounts
    required: Work = Work()
    """What training on these examples needs."""
    executed: Work = Work()
    """What computing them padded takes."""

    @property
    def shape(self) -> tuple[int, int]:
        """Most rows and most positions (padded, virtual ones not counted) of this rank's micro-batches."""
        shapes = [micro_batch.input_ids.shape for micro_batch in self.micro_batches]
        return max(rows for rows, _ in shapes), max(width for _, width in shapes)


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples into a micro-batch."""

    pad_token: int
    virtual_tokens: int = 0
    pad_to: int | None = None
    """Width of every micro-batch; None pads to the longest row."""
    as_published: bool = False
    """Label every position, padding too."""

    def collate(self, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> MicroBatch:
        """``rows`` of token ids and the number of unlabelled ones at the start of each."""
        width = self.pad_to or max(map(len, rows))
        input_ids = torch.full((len(rows), width), self.pad_token)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            ids = torch.as_tensor(row)
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            # By position, not by id: where the pad token is the end token, the end must still be learnt.
            labels[index, prompt : len(ids)] = ids[prompt:]
        return MicroBatch(input_ids, attention_mask, input_ids.clone() if self.as_published else labels)

    def count(self, batch: MicroBatch) -> TokenCounts:
        """Exact counts of one micro-batch. The first position of a row is never predicted."""
        rows, width = batch.input_ids.shape
        labelled = int((batch.labels[:, 1:] != IGNORED).sum())
        return TokenCounts(int(batch.attention_mask.sum()), rows * width, labelled, rows * self.virtual_tokens)

    def required(self, batch: MicroBatch) -> Work:
        """Real and virtual tokens, each attending to itself and what is before it; the head at labels."""
        lengths = [length + self.virtual_tokens for length in batch.attention_mask.sum(dim=1).tolist()]
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return Work(sum(lengths), pairs, self.count(batch).labelled)

    def executed(self, batch: MicroBatch) -> Work:
        """Every position of the padded rectangle, all pairs, and the head everywhere."""
        rows, width = batch.input_ids.shape[0], batch.input_ids.shape[1] + self.virtual_tokens
        return Work(rows * width, rows * width**2, rows * width, width)


class Rows(Protocol):
    """Encoded examples: a :class:`datasets.Dataset` with these two columns, or anything that answers alike."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int], /) -> Mapping[str, Sequence[Any]]:
        """``input_ids`` (lists of token ids) and ``prompt_tokens`` (how many of each are not labelled)."""


@dataclass(frozen=True)
class Batches:
    """The global batches of a run, in order, as one rank sees them."""

    dataset: Rows
    collator: Collator
    global_batch: int
    micro_batch: int | None
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_share(self.global_batch, self.world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank runs for one step."""
        return division(self.global_batch, self.micro_batch, self.world_size)[0]

    @property
    def largest_micro_batch(self) -> int:
        """Most examples in one of them."""
        return division(self.global_batch, self.micro_batch, self.world_size)[1]

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
        examples = list(zip(rows["input_ids"], rows["prompt_tokens"], strict=True))
        if not self.collator.as_published:
            examples.sort(key=lambda example: len(example[0]))
        mine: list[MicroBatch] = []
        counts, required, executed = TokenCounts(), Work(), Work()
        # Neighbours in length go to the ranks of one micro-step, so that no rank waits for another.
        for index, part in enumerate(_cut(examples, self.accumulation * self.world_size)):
            micro_batch = self.collator.collate(*zip(*part, strict=True))
            counts += self.collator.count(micro_batch)
            required += self.collator.required(micro_batch)
            executed += self.collator.executed(micro_batch)
            if index % self.world_size == self.rank:
                mine.append(micro_batch)
        return GlobalBatch(tuple(mine), counts, required, executed)


def check_share(global_batch: int, world_size: int) -> None:
    """Whether every process can have as many examples of a step as the others.

    Raises:
        OutOfRangeError: it cannot.
    """
    if global_batch % world_size:
        raise OutOfRangeError(
            f"train.global_batch={global_batch} cannot be shared by {world_size} processes; "
            f"use a multiple of {world_size}, or another number of processes"
        )


def division(global_batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """How a process does its share of a step: in how many micro-batches, and of how many examples at most."""
    share = max(1, global_batch // world_size)
    accumulation = math.ceil(share / min(micro_batch or share, share))
    return accumulation, math.ceil(share / accumulation)


def _cut(examples: list[tuple[list[int], int]], parts: int) -> Iterator[list[tuple[list[int], int]]]:
    """``parts`` runs of neighbours, their sizes as equal as can be."""
    bounds = [index * len(examples) // parts for index in range(parts + 1)]
    for start, stop in itertools.pairwise(bounds):
        yield examples[start:stop]
