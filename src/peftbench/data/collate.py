"""Collate encoded examples into micro-batches, and count their tokens and their work exactly.

Padding is on the right. A causal model does not attend to later positions, so padding needs no mask: its outputs are
discarded and do not affect earlier positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch

from peftbench.data.encode import iter_spans


@dataclass(frozen=True)
class _FieldwiseSum:
    """Base class that adds field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class TokenCounts(_FieldwiseSum):
    """Token counts of a batch, by kind."""

    real: int = 0
    """Tokens of the examples, start and end tokens included."""
    padded: int = 0
    """Computed positions: real tokens and padding, without virtual tokens."""
    labeled: int = 0
    """Positions that contribute to the loss."""
    virtual: int = 0
    """Virtual tokens that a method adds before the sequences."""


@dataclass(frozen=True)
class FlopUnits(_FieldwiseSum):
    """Sums over sequences that, with the model, determine the FLOPs."""

    positions: int = 0
    """Positions through the backbone, virtual tokens included."""
    pairs: int = 0
    """Query-key pairs, for kernels that compute all of them."""
    causal_pairs: int = 0
    """Query-key pairs, for kernels that skip keys after their query."""
    labeled: int = 0
    """Positions that contribute to the loss."""
    columns: int = 0
    """Width of each micro-batch, counted once: the positions of its rotary embeddings."""
    rows: int = 0
    """Rows, counted for hardware FLOPs only: a convolution also computes its own padding in each row."""
    passes: int = 0
    """Forward passes, counted for hardware FLOPs only: a product of two weights runs once in each pass."""


@dataclass(frozen=True)
class PackedSequences:
    """Sequences that share one row; each attends only to itself."""

    lengths: tuple[int, ...]
    """Positions of each sequence, virtual tokens included."""
    max_seqlen: int
    """Largest of ``lengths``."""
    cu_seqlens: torch.Tensor
    """Start of each sequence and end of the last: (sequences + 1,), int32."""
    position_ids: torch.Tensor
    """Positions, from 0 in each sequence: (1, positions)."""
    virtual_token_indices: torch.Tensor
    """Indices of virtual tokens in the row: (sequences x virtual tokens,)."""

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], virtual_tokens: int = 0, device: torch.device | None = None, *, padding: int = 0
    ) -> PackedSequences:
        """Pack sequences of these lengths, then one of ``padding`` positions without virtual tokens."""
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
        """Return a copy with ``function`` applied to each tensor."""
        return replace(
            self,
            cu_seqlens=function(self.cu_seqlens),
            position_ids=function(self.position_ids),
            virtual_token_indices=function(self.virtual_token_indices),
        )


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass: rows padded on the right, or sequences packed into one row."""

    input_ids: torch.Tensor
    """(rows, width); a packed row also has a position for each virtual token."""
    logit_indices: torch.Tensor
    """Positions that predict the labeled tokens: (labeled,), in the flattened rows with virtual tokens."""
    targets: torch.Tensor
    """The labeled tokens: (labeled,), row by row."""
    lengths: tuple[int, ...]
    """Real tokens of each example."""
    example_indices: tuple[int, ...] = ()
    """Indices of the examples in their dataset, in the order of ``lengths``."""
    attention_mask: torch.Tensor | None = None
    """(rows, width); only if padding is labeled and must not be attended to."""
    packed_sequences: PackedSequences | None = None
    feature_mode: Literal["recompute", "save", "load"] = "recompute"
    """Hidden states: computed and not saved, computed and saved to the feature store, or loaded from it."""

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass."""
        if self.packed_sequences is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        given = {
            "input_ids": self.input_ids,
            "position_ids": self.packed_sequences.position_ids,
            "packed_sequences": self.packed_sequences,
        }
        return given | (
            {"virtual_token_indices": self.packed_sequences.virtual_token_indices}
            if len(self.packed_sequences.virtual_token_indices)
            else {}
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """Return a copy with ``function`` applied to each tensor."""
        return replace(
            self,
            input_ids=function(self.input_ids),
            logit_indices=function(self.logit_indices),
            targets=function(self.targets),
            attention_mask=None if self.attention_mask is None else function(self.attention_mask),
            packed_sequences=None if self.packed_sequences is None else self.packed_sequences.map(function),
        )

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy on ``device``; the copy is asynchronous from pinned memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """Return a copy in pinned memory, from which a GPU copies asynchronously."""
        return self.map(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples into a micro-batch."""

    pad_token_id: int
    virtual_tokens: int = 0
    pad_to_length: int | None = None
    """Width of every micro-batch; None: pad to the longest row."""
    label_padding: bool = False
    """Label every position, padding included."""
    pad_to_multiple_of: int = 1
    """Pad rows to a multiple of this, so that fewer shapes occur."""
    max_positions: int | None = None
    """Positions of the model, the limit of padding to a multiple; None: no limit."""

    def count_positions(self, lengths: Sequence[int]) -> int:
        """Return the computed positions of a micro-batch with these lengths, virtual tokens included."""
        return len(lengths) * (self.padded_width(max(lengths)) + self.virtual_tokens)

    def padded_width(self, max_length: int) -> int:
        """Return the width of rows whose longest has ``max_length`` tokens, without virtual tokens."""
        if self.pad_to_length:
            return self.pad_to_length
        width = max_length + self._padding_to_multiple(max_length + self.virtual_tokens)
        return (
            width
            if self.max_positions is None
            else max(max_length, min(width, self.max_positions - self.virtual_tokens))
        )

    def _padding_to_multiple(self, positions: int) -> int:
        """Return the padding from ``positions`` to the next multiple."""
        return -positions % self.pad_to_multiple_of

    def collate(
        self, rows: Sequence[Sequence[int]], label_spans: Sequence[Sequence[int]], example_indices: Sequence[int] = ()
    ) -> MicroBatch:
        """Collate ``rows`` of token ids, with the spans of labels of each: start, end, start, end, ..."""
        width = self.padded_width(max(map(len, rows)))
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.as_tensor(row)
        # By position, not by id: the pad token can be the end token, which must be learned.
        places = [_list_labels((0, width) if self.label_padding else spans) for spans in label_spans]
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
        """Return the exact token counts of one micro-batch. The first position of a row is never predicted."""
        rows = len(batch.lengths)
        return TokenCounts(sum(batch.lengths), batch.input_ids.numel(), len(batch.targets), rows * self.virtual_tokens)

    def model_flop_units(self, batch: MicroBatch) -> FlopUnits:
        """Return the work for real and virtual tokens with causal attention, and the head at labeled positions."""
        return self._flop_units_of_lengths(batch, [length + self.virtual_tokens for length in batch.lengths])

    def hardware_flop_units(self, batch: MicroBatch) -> FlopUnits:
        """Return the work for every position of the padded rows."""
        rows, width = batch.input_ids.shape[0], batch.input_ids.shape[1] + self.virtual_tokens
        padded = batch.attention_mask is not None and len({*batch.lengths, batch.input_ids.shape[1]}) > 1
        pairs = rows * width**2  # with a mask, a kernel cannot skip any pair
        causal = pairs if padded else rows * _count_causal_pairs(width)
        return FlopUnits(rows * width, pairs, causal, len(batch.targets), width, rows, 1)

    def _flop_units_of_lengths(self, batch: MicroBatch, lengths: Sequence[int]) -> FlopUnits:
        total, causal = sum(lengths), sum(map(_count_causal_pairs, lengths))
        return FlopUnits(total, sum(length**2 for length in lengths), causal, len(batch.targets), total)


@dataclass(frozen=True)
class PaddingFreeCollator(Collator):
    """Packs encoded examples into one row without attention between them; only the end of the row is padded."""

    def count_positions(self, lengths: Sequence[int]) -> int:
        taken = sum(lengths) + len(lengths) * self.virtual_tokens
        return taken + self._padding_to_multiple(taken)

    def collate(
        self, rows: Sequence[Sequence[int]], label_spans: Sequence[Sequence[int]], example_indices: Sequence[int] = ()
    ) -> MicroBatch:
        virtual = [torch.full((self.virtual_tokens,), self.pad_token_id)] if self.virtual_tokens else []
        lengths = [len(row) + self.virtual_tokens for row in rows]
        padding = self._padding_to_multiple(sum(lengths))
        documents = PackedSequences.from_lengths(lengths, self.virtual_tokens, padding=padding)
        parts = [part for row in rows for part in (*virtual, torch.as_tensor(row, dtype=torch.long))]
        input_ids = torch.cat([*parts, torch.full((padding,), self.pad_token_id)])
        places = [
            int(start) + self.virtual_tokens + _list_labels(spans)
            for start, spans in zip(documents.cu_seqlens, label_spans, strict=False)
        ]
        labeled = torch.cat(places)
        return MicroBatch(
            input_ids[None],
            labeled - 1,
            input_ids[labeled],
            tuple(map(len, rows)),
            tuple(example_indices),
            packed_sequences=documents,
        )

    def count_tokens(self, batch: MicroBatch) -> TokenCounts:
        counts = super().count_tokens(batch)
        return replace(counts, padded=counts.padded - counts.virtual)

    def hardware_flop_units(self, batch: MicroBatch) -> FlopUnits:
        """Return the work for every position of the row, padding at its end included."""
        assert batch.packed_sequences is not None
        units = self._flop_units_of_lengths(batch, batch.packed_sequences.lengths)
        return replace(units, rows=batch.input_ids.shape[0], passes=1)


def _list_labels(spans: Sequence[int]) -> torch.Tensor:
    """Return the labeled positions of a row. Its first token is never predicted."""
    return torch.cat([torch.arange(max(1, int(start)), int(end)) for start, end in iter_spans(spans)])


def _count_causal_pairs(length: int) -> int:
    """Return the number of pairs of each position with itself and earlier positions."""
    return length * (length + 1) // 2
