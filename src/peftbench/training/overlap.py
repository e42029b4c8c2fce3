"""Examples of an evaluated split that the model was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftbench.record import SplitOverlap

if TYPE_CHECKING:
    from datasets import Dataset

_READ_CHUNK_SIZE = 1000


def find_overlap(train: Dataset, evaluated: Dataset, *, has_ids: bool, is_same_file: bool) -> SplitOverlap:
    """Count the evaluated examples whose text, text and summary, or id is also in the training split.

    ``has_ids`` is False if ids are row numbers, which any two splits share.
    """
    texts, pairs, ids = set(), set(), set()
    for id, article, summary in _iter_rows(train):
        texts.add(_hash(article))
        pairs.add(_hash(article, summary))
        ids.add(id)
    shared_texts = shared_pairs = shared_ids = 0
    for id, article, summary in _iter_rows(evaluated):
        shared_texts += _hash(article) in texts
        shared_pairs += _hash(article, summary) in pairs
        shared_ids += id in ids
    return SplitOverlap(
        texts=shared_texts,
        texts_with_summary=shared_pairs,
        ids=shared_ids if has_ids else 0,
        same_file=is_same_file,
    )


def _iter_rows(dataset: Dataset) -> Iterator[tuple[str, str, str]]:
    for start in range(0, len(dataset), _READ_CHUNK_SIZE):
        rows = dataset[start : start + _READ_CHUNK_SIZE]
        yield from zip(rows["id"], rows["article"], rows["summary"], strict=True)


def _hash(*texts: str) -> bytes:
    """Return a hash of texts without regard to spaces at their ends."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.strip().encode("utf-8", "surrogatepass") + b"\x00")
    return digest.digest()
