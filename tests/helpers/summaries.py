"""Examples of the task summarization, which most tests train on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.tasks.summarization import Summarization

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from peftbench.data.base import Source
    from peftbench.data.readers.rows import Columns, Example

SEPARATOR = "\nTL;DR:"


def select_columns(source: Source, **columns: str) -> Columns:
    """Return the columns that summarization reads from ``source``; keyword arguments name them."""
    return Summarization(**columns).select_columns(source.id_column)  # type: ignore[arg-type]


def load_summaries(source: Source, split: str = "train", **columns: str) -> Dataset:
    """Return the articles and summaries of a split."""
    return source.load(split, select_columns(source, **columns))


def as_example(article: str, summary: str = "s") -> Example:
    """Return an article and its summary as a row of a data set."""
    return {"id": "0", "article": article, "summary": summary}


def summary_encoder(
    tokenizer: PreTrainedTokenizerBase, max_length: int = 128, max_new_tokens: int = 16, separator: str = SEPARATOR
) -> Encoder:
    """Return an encoder of articles and summaries."""
    return Encoder(tokenizer, SequenceLayout(max_length, max_new_tokens), Summarization(separator=separator))
