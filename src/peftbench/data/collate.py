"""From encoded examples to what one forward pass is given, and exact counts of its tokens and its work.

Padding stands at the right, after all that a causal model may look at, so no mask is needed for it: what is computed
there is thrown away and changes nothing before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch


@dataclass(frozen=True)
class _FieldwiseSum:
    """Adds up field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class TokenCounts(_FieldwiseSum):
    """Tokens of a batch, four kinds that must not be mixed."""

    real: int = 0
    """Tokens of articles, separators, summaries and ends."""
    padded: int = 0
    """Positions computed: real tokens and padding, virtual ones not counted."""
    labelled: int = 0
    """Positions that enter the loss."""
    virtual: int = 0
    """Soft tokens a method puts before the sequences."""


@dataclass(frozen=True)
class FlopUnits(_FieldwiseSum):
    """What is computed for sequences, summed over them: all that FLOPs depend on beside the model."""

    positions: int = 0
    """Through the trunk, virtual tokens included."""
    pairs: int = 0
    """Of query and key, for kernels that compute all of them."""
    causal_pairs: int = 0
    """The same for kernels that skip keys after their query."""
    labelled: int = 0
    """Positions that enter the loss."""
    columns: int = 0
    """Width of each micro-batch, once: what rotary embeddings are computed for."""


@dataclass(frozen=True)
class PackedSequences:
    """Sequences that share one row, each of which attends to itself alone."""

    lengths: tuple[int, ...]
    """Positions of each, virtual tokens included."""
    max_seqlen: int
    """The most of them."""
    cu_seqlens: torch.Tensor
    """Where each begins and the last ends: (documents + 1,), int32."""
    position_ids: torch.Tensor
    """Counted from 0 in each: (1, positions)."""
    virtual_token_indices: torch.Tensor
    """Places of soft tokens in the row: (documents x virtual tokens,)."""

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], virtual_tokens: int = 0, device: torch.device | None = None, *, padding: int = 0
    ) -> PackedSequences:
        """Documents of that many positions each, and one of padding after them, which has no soft tokens."""
        begins = [0, *itertools.accumulate(lengths)][:-1]
        places = [torch.arange(start, start + virtual_tokens) for start in begins]
        lengths = [*lengths, padding] if padding else lengths
        starts = [0, *itertools.accumulate(lengths)]
        return cls(
            tuple(lengths),
            max(lengths),
            torch.tensor(starts, dtype=torch.int32).to(device),
            torch.cat([torch.arange(length) for length in lengths])[None].to(device),
            torch.cat(places).to(device),
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedSequences:
        """The same with ``function`` of each tensor."""
        return replace(
            self,
            cu_seqlens=function(self.cu_seqlens),
            position_ids=function(self.position_ids),
            virtual_token_indices=function(self.virtual_token_indices),
        )


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass is given: rows padded at the right, or documents one after another in a single row."""

    input_ids: torch.Tensor
    """(rows, width); where documents share a row, with a place for each soft token."""
    logit_indices: torch.Tensor
    """Where each labelled token is predicted: (labelled,), places in the flattened rows, virtual tokens counted."""
    targets: torch.Tensor
    """The labelled tokens: (labelled,), row by row."""
    lengths: tuple[int, ...]
    """Real tokens of each example."""
    example_indices: tuple[int, ...] = ()
    """Which they are, as indices into their dataset, in the order of ``lengths``."""
    attention_mask: torch.Tensor | None = None
    """(rows, width), where padding enters the loss and may not be looked at."""
    packed_sequences: PackedSequences | None = None
    feature_mode: Literal["recompute", "save", "load"] = "recompute"
    """Hidden states: computed and not saved, computed and saved to the feature store, or loaded from it."""

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward pass."""
        if self.packed_sequences is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        given = {
            "input_ids": self.input_ids,
            "position_ids": self.packed_sequences.position_ids,
            "packed_sequences": self.packed_sequences,
        }
        return given | (
            {"virtual": self.packed_sequences.virtual_token_indices}
            if len(self.packed_sequences.virtual_token_indices)
            else {}
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """The same with ``function`` of each tensor."""
        return replace(
            self,
            input_ids=function(self.input_ids),
            logit_indices=function(self.logit_indices),
            targets=function(self.targets),
            attention_mask=None if self.attention_mask is None else function(self.attention_mask),
            packed_sequences=None if self.packed_sequences is None else self.packed_sequences.map(function),
        )

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on ``device``, not waited for where it comes from pinned memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """A copy in memory that a GPU can fetch it from while it computes."""
        return self.map(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples into a micro-batch."""

    pad_token_id: int
    virtual_tokens: int = 0
    pad_to_length: int | None = None
    """Width of every micro-batch; None pads to the longest row."""
    label_padding: bool = False
    """Label every position, padding too."""
    pad_to_multiple_of: int = 1
    """Rows are padded to a multiple of so many positions, so that fewer sizes occur."""
    max_positions: int | None = None
    """Positions of the model, which no multiple exceeds; None knows of no end."""

    def count_positions(self, lengths: Sequence[int]) -> int:
        """What a micro-batch of these lengths is computed over, virtual tokens included."""
        return len(lengths) * (self.padded_width(max(lengths)) + self.virtual_tokens)

    def padded_width(self, max_length: int) -> int:
        """Of rows the longest of which has so many tokens, virtual ones not counted."""
        if self.pad_to_length:
            return self.pad_to_length
        width = max_length + self._padding_to_multiple(max_length + self.virtual_tokens)
        return (
            width
            if self.max_positions is None
            else max(max_length, min(width, self.max_positions - self.virtual_tokens))
        )

    def _padding_to_multiple(self, positions: int) -> int:
        """What so many positions lack of a multiple."""
        return -positions % self.pad_to_multiple_of

    def collate(
        self, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int], example_indices: Sequence[int] = ()
    ) -> MicroBatch:
        """``rows`` of token ids and the number of unlabelled ones at the start of each."""
        width = self.padded_width(max(map(len, rows)))
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.as_tensor(row)
        # By position, not by id: where the pad token is the end token, the end must still be learnt. A row's first
        # token is never predicted.
        ends = [width if self.label_padding else len(row) for row in rows]
        first = [1 if self.label_padding else max(1, prompt) for prompt in prompt_lengths]
        places = [torch.arange(start, end) for start, end in zip(first, ends, strict=True)]
        stride = width + self.virtual_tokens
        predictors = [index * stride + self.virtual_tokens + place - 1 for index, place in enumerate(places)]
        targets = [input_ids[index, place] for index, place in enumerate(places)]
        lengths = tuple(map(len, rows))
        mask = torch.arange(width) < torch.tensor(lengths)[:, None] if self.label_padding else None
        return MicroBatch(
            input_ids,
            torch.cat(predictors),
            torch.cat(targets),
            lengths,
            tuple(example_indices),
            None if mask is None else mask.long(),
        )

    def count_tokens(self, batch: MicroBatch) -> TokenCounts:
        """Exact counts of one micro-batch. The first position of a row is never predicted."""
        rows = len(batch.lengths)
        return TokenCounts(sum(batch.lengths), batch.input_ids.numel(), len(batch.targets), rows * self.virtual_tokens)

    def model_flop_units(self, batch: MicroBatch) -> FlopUnits:
        """Real and virtual tokens, each attending to itself and what is before it; the head at labels."""
        return self._flop_units_of_lengths(batch, [length + self.virtual_tokens for length in batch.lengths])

    def hardware_flop_units(self, batch: MicroBatch) -> FlopUnits:
        """Every position of the padded rectangle."""
        rows, width = batch.input_ids.shape[0], batch.input_ids.shape[1] + self.virtual_tokens
        padded = batch.attention_mask is not None and len({*batch.lengths, batch.input_ids.shape[1]}) > 1
        pairs = rows * width**2  # and a mask is what keeps a kernel from skipping any
        causal = pairs if padded else rows * _count_causal_pairs(width)
        return FlopUnits(rows * width, pairs, causal, len(batch.targets), width)

    def _flop_units_of_lengths(self, batch: MicroBatch, lengths: Sequence[int]) -> FlopUnits:
        total, causal = sum(lengths), sum(map(_count_causal_pairs, lengths))
        return FlopUnits(total, sum(length**2 for length in lengths), causal, len(batch.targets), total)


@dataclass(frozen=True)
class PaddingFreeCollator(Collator):
    """Puts encoded examples one after another into a single row, where none sees another: padded is that row alone."""

    def count_positions(self, lengths: Sequence[int]) -> int:
        taken = sum(lengths) + len(lengths) * self.virtual_tokens
        return taken + self._padding_to_multiple(taken)

    def collate(
        self, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int], example_indices: Sequence[int] = ()
    ) -> MicroBatch:
        virtual = [torch.full((self.virtual_tokens,), self.pad_token_id)] if self.virtual_tokens else []
        lengths = [len(row) + self.virtual_tokens for row in rows]
        padding = self._padding_to_multiple(sum(lengths))
        documents = PackedSequences.from_lengths(lengths, self.virtual_tokens, padding=padding)
        parts = [part for row in rows for part in (*virtual, torch.as_tensor(row, dtype=torch.long))]
        input_ids = torch.cat([*parts, torch.full((padding,), self.pad_token_id)])
        places = [
            int(start) + self.virtual_tokens + torch.arange(max(1, prompt), len(row))
            for start, row, prompt in zip(documents.cu_seqlens, rows, prompt_lengths, strict=False)
        ]
        labelled = torch.cat(places)
        return MicroBatch(
            input_ids[None],
            labelled - 1,
            input_ids[labelled],
            tuple(map(len, rows)),
            tuple(example_indices),
            packed_sequences=documents,
        )

    def count_tokens(self, batch: MicroBatch) -> TokenCounts:
        counts = super().count_tokens(batch)
        return replace(counts, padded=counts.padded - counts.virtual)

    def hardware_flop_units(self, batch: MicroBatch) -> FlopUnits:
        """Every position of the row, the padding at its end among them."""
        assert batch.packed_sequences is not None
        return self._flop_units_of_lengths(batch, batch.packed_sequences.lengths)


def _count_causal_pairs(length: int) -> int:
    """Pairs of each position with itself and those before it."""
    return length * (length + 1) // 2
