"""Small micro-batches with random tokens, and what transformers needs to compute the same."""

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
"""Tokens of each row of ``micro_batch``, and how many of them are prompt: labelled tokens are 3, 9, 1 and 14."""


def rows(lengths_and_prompts: Lengths, seed: int = 5) -> list[dict[str, Any]]:
    """Encoded examples of these lengths with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(1, 4096, (length,), generator=generator).tolist(), "prompt_tokens": prompt}
        for length, prompt in lengths_and_prompts
    ]


def micro_batch(lengths_and_prompts: Lengths = LENGTHS_AND_PROMPTS, seed: int = 5, virtual: int = 0) -> MicroBatch:
    """Random tokens in rows of unequal length, padded at the right."""
    from peftbench.data.collate import Collator

    made = rows(lengths_and_prompts, seed)
    return Collator(0, virtual).collate([row["input_ids"] for row in made], [row["prompt_tokens"] for row in made])


def packed(
    lengths_and_prompts: Lengths = LENGTHS_AND_PROMPTS, seed: int = 5, virtual: int = 0, multiple: int = 1
) -> MicroBatch:
    """The same examples one after another in a single row."""
    from peftbench.data.collate import PaddingFreeCollator

    made, packer = rows(lengths_and_prompts, seed), PaddingFreeCollator(0, virtual, pad_to_multiple_of=multiple)
    return packer.collate([row["input_ids"] for row in made], [row["prompt_tokens"] for row in made])


def labelled(batch: MicroBatch) -> int:
    """Tokens of ``batch`` that enter the loss."""
    return len(batch.targets)


def mask_of(batch: MicroBatch) -> torch.Tensor:
    """Which positions of padded rows are real, as transformers is told: (rows, width)."""
    return (torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()


def logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits over all real positions and padding, as transformers computes them: (rows, width, vocabulary)."""
    output: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=mask_of(batch), use_cache=False).logits
    return output[:, -batch.input_ids.shape[1] :]


def labels_of(batch: MicroBatch, virtual_tokens: int = 0) -> torch.Tensor:
    """The labels of padded rows as transformers takes them, -100 where there is none: (rows, width)."""
    rows_of_labels = torch.full((batch.input_ids.shape[0], batch.input_ids.shape[1] + virtual_tokens), -100)
    rows_of_labels.view(-1)[batch.logit_indices + 1] = batch.targets
    return rows_of_labels[:, virtual_tokens:]


def shown(batch: MicroBatch, virtual_tokens: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of each example and their labels, -100 where there is none, in padded rows or in documents of one."""
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
        (row[:length].tolist(), labelled_[:length].tolist())
        for row, labelled_, length in zip(ids, labels, batch.lengths, strict=True)
    ]


def one_batch(*parts: MicroBatch) -> GlobalBatch:
    """The global batch of these micro-batches, on the only process."""
    from peftbench.data.batches import GlobalBatch
    from peftbench.data.collate import Collator, TokenCounts

    counts = TokenCounts()
    for part in parts:
        counts += Collator(pad_token_id=0).count_tokens(part)
    return GlobalBatch(parts, counts)
