"""Small micro-batches with random tokens, and the same inputs in the format of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peftbench.data.batches import GlobalBatch
    from peftbench.data.collate import MicroBatch

Lengths = Sequence[tuple[int, int]]


LENGTHS_AND_PROMPTS = ((9, 6), (14, 5), (20, 19), (26, 12))
"""Length and prompt tokens of each row of ``micro_batch``; the rows have 3, 9, 1 and 14 labeled tokens."""


def rows(lengths_and_prompts: Lengths, seed: int = 5) -> list[dict[str, Any]]:
    """Return encoded examples of the given lengths with random tokens; all after the prompt are labeled."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(1, 4096, (length,), generator=generator).tolist(), "label_spans": [prompt, length]}
        for length, prompt in lengths_and_prompts
    ]


def micro_batch(lengths_and_prompts: Lengths = LENGTHS_AND_PROMPTS, seed: int = 5, virtual: int = 0) -> MicroBatch:
    """Return random tokens in rows of unequal length, padded on the right."""
    from peftbench.data.collate import Collator

    examples = rows(lengths_and_prompts, seed)
    ids, label_spans = ([row[key] for row in examples] for key in ("input_ids", "label_spans"))
    return Collator(0, virtual).collate(ids, label_spans)


def packed(
    lengths_and_prompts: Lengths = LENGTHS_AND_PROMPTS, seed: int = 5, virtual: int = 0, multiple: int = 1
) -> MicroBatch:
    """Return the examples of ``micro_batch`` one after another in a single row."""
    from peftbench.data.collate import PaddingFreeCollator

    examples = rows(lengths_and_prompts, seed)
    ids, label_spans = ([row[key] for row in examples] for key in ("input_ids", "label_spans"))
    return PaddingFreeCollator(0, virtual, pad_to_multiple_of=multiple).collate(ids, label_spans)


def count_labeled_tokens(batch: MicroBatch) -> int:
    """Return the number of tokens in the loss of ``batch``."""
    return len(batch.targets)


def mask_of(batch: MicroBatch) -> torch.Tensor:
    """Return the attention mask of padded rows for transformers: (rows, width)."""
    return (torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()


def logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Return the logits of transformers at all real and padded positions: (rows, width, vocabulary)."""
    output: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=mask_of(batch), use_cache=False).logits
    return output[:, -batch.input_ids.shape[1] :]


def labels_of(batch: MicroBatch, virtual_tokens: int = 0) -> torch.Tensor:
    """Return the labels of padded rows for transformers, -100 for positions without a label: (rows, width)."""
    rows_of_labels = torch.full((batch.input_ids.shape[0], batch.input_ids.shape[1] + virtual_tokens), -100)
    rows_of_labels.view(-1)[batch.logit_indices + 1] = batch.targets
    return rows_of_labels[:, virtual_tokens:]


def list_tokens_and_labels(batch: MicroBatch, virtual_tokens: int) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and labels of each example of padded or packed rows, -100 for tokens without a label."""
    if batch.packed_sequences is None:
        ids, labels = list(batch.input_ids), list(labels_of(batch, virtual_tokens))
    else:
        flat = torch.full((batch.input_ids.shape[1],), -100)
        flat[batch.logit_indices + 1] = batch.targets
        real = torch.ones_like(flat, dtype=torch.bool).index_fill(
            0, batch.packed_sequences.virtual_token_indices, False
        )
        real[sum(batch.packed_sequences.lengths[: len(batch.lengths)]) :] = False
        ids, labels = (list(values[real].split(batch.lengths)) for values in (batch.input_ids[0], flat))
    return [
        (row[:length].tolist(), row_labels[:length].tolist())
        for row, row_labels, length in zip(ids, labels, batch.lengths, strict=True)
    ]


def one_batch(*parts: MicroBatch) -> GlobalBatch:
    """Return the global batch of these micro-batches in a single process."""
    from peftbench.data.batches import GlobalBatch
    from peftbench.data.collate import Collator, TokenCounts

    counts = TokenCounts()
    for part in parts:
        counts += Collator(pad_token_id=0).count_tokens(part)
    return GlobalBatch(parts, counts)
