"""Examples of an evaluated split that the model was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftbench.record import SplitOverlap

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.tasks.base import Task

_READ_CHUNK_SIZE = 1000


def find_overlap(train: Dataset, evaluated: Dataset, task: Task, *, has_ids: bool, is_same_file: bool) -> SplitOverlap:
    """Count the evaluated examples whose prompt, prompt and reference, or id is also in the training split.

    ``has_ids`` is False if ids are row numbers, which any two splits share.
    """
    texts, pairs, ids = set(), set(), set()
    for id, prompt, reference in _iter_rows(train, task):
        texts.add(_hash(prompt))
        pairs.add(_hash(prompt, reference))
        ids.add(id)
    shared_texts = shared_pairs = shared_ids = 0
    for id, prompt, reference in _iter_rows(evaluated, task):
        shared_texts += bool(prompt) and _hash(prompt) in texts
        shared_pairs += _hash(prompt, reference) in pairs
        shared_ids += id in ids
    return SplitOverlap(
        texts=shared_texts,
        texts_with_reference=shared_pairs,
        ids=shared_ids if has_ids else 0,
        same_file=is_same_file,
    )


def _iter_rows(dataset: Dataset, task: Task) -> Iterator[tuple[str, str, str]]:
    text = dataset.select_columns(["id", *task.columns])
    for start in range(0, len(text), _READ_CHUNK_SIZE):
        rows = text[start : start + _READ_CHUNK_SIZE]
        for cells in zip(*rows.values(), strict=True):
            example = dict(zip(rows, cells, strict=True))
            yield example["id"], task.get_prompt(example), task.get_reference(example)


def _hash(*texts: str) -> bytes:
    """Return a hash of texts without regard to spaces at their ends."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.strip().encode("utf-8", "surrogatepass") + b"\x00")
    return digest.digest()
