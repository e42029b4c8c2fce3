"""The examples that a run would read: encoded, their lengths, and every fault of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftbench.data.encode import ENCODED_COLUMNS, Encoder, count_labels
from peftbench.errors import DataError
from peftbench.modeling.loading import get_max_positions, load_config, load_tokenizer
from peftbench.training.auto_settings import resolve_task
from peftbench.training.data import build_encoder, load_split, select_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftbench.recipe.schema import Recipe


@dataclass(frozen=True)
class _Tokenizer:
    tokenizer: PreTrainedTokenizerBase
    max_positions: int | None


@dataclass(frozen=True)
class EncodedExample:
    """One example as a run would train on it."""

    id: str
    input_ids: list[int]
    label_spans: list[int]
    whole_ids: list[int]
    """Tokens before anything is cut; those of ``input_ids`` if nothing is."""


@dataclass(frozen=True)
class DataSummary:
    """The examples of a split: how long they are, and what happens to those that are too long."""

    split: str
    max_length: int
    lengths: list[int]
    """Tokens of each example before anything is cut."""
    num_labels: list[int]
    """Labeled tokens of each example that is kept."""
    num_cut: int
    """Examples that are cut and kept."""
    num_cut_labels: int
    """Labeled tokens that are cut, over the examples that are kept."""
    num_dropped: int
    """Examples that do not fit even when they are cut; a run refuses or drops them."""
    num_with_control_tokens: int
    """Examples with control tokens that the tokenizer made of text."""
    shown: list[EncodedExample]
    """The first examples."""


def list_all_faults(recipe: Recipe, split: str) -> list[DataError]:
    """Return what is wrong with the rows of a split, one error per row.

    Rows are rendered and encoded only if all of them can be read.

    Raises:
        PeftbenchError: the split, the tokenizer or the model's config cannot be read.
    """
    recipe, _ = resolve_task(recipe)
    faults = recipe.data.source.list_faults(split, select_columns(recipe))
    return faults or list(_iter_encoding_faults(recipe, split))


def _iter_encoding_faults(recipe: Recipe, split: str) -> Iterator[DataError]:
    encoder = build_split_encoder(recipe)
    for example in load_split(recipe, split):
        try:
            encoder.encode_example(example)
        except DataError as error:
            yield error


def build_split_encoder(recipe: Recipe) -> Encoder:
    """Return the encoder of a recipe whose task is resolved, without loading the model.

    Raises:
        PeftbenchError: the tokenizer or the model's config cannot be read.
    """
    max_positions = get_max_positions(load_config(recipe.model))
    return build_encoder(recipe, _Tokenizer(load_tokenizer(recipe.model), max_positions))


def summarize_split(recipe: Recipe, encoder: Encoder, split: str, num_shown: int) -> DataSummary:
    """Encode a split and return its lengths, its counts and the first ``num_shown`` examples.

    Raises:
        DataError: an example cannot be read or rendered.
    """
    dataset = load_split(recipe, split)
    encoded = encoder.encode_all(dataset, split)
    columns: dict[str, Any] = {name: encoded[name] for name in ENCODED_COLUMNS if name != "input_ids"}
    kept_lengths = [len(ids) for ids in encoded["input_ids"]]
    limit = encoder.layout.max_length
    prompt_limit = limit - encoder.layout.max_new_tokens if split == recipe.evaluate.split else limit
    fits = [
        needed <= limit and prompt <= prompt_limit
        for needed, prompt in zip(columns["needed"], columns["prompt_needed"], strict=True)
    ]
    return DataSummary(
        split=split,
        max_length=limit,
        lengths=[kept + cut for kept, cut in zip(kept_lengths, columns["cut_tokens"], strict=True)],
        num_labels=[count_labels(spans) for spans, fit in zip(columns["label_spans"], fits, strict=True) if fit],
        num_cut=sum(cut > 0 and fit for cut, fit in zip(columns["cut_tokens"], fits, strict=True)),
        num_cut_labels=sum(cut for cut, fit in zip(columns["cut_labels"], fits, strict=True) if fit),
        num_dropped=fits.count(False),
        num_with_control_tokens=sum(count > 0 for count in columns["control_tokens"]),
        shown=[
            EncodedExample(
                row["id"],
                row["input_ids"],
                row["label_spans"],
                encoder.tokenize_whole(row) if row["cut_tokens"] else row["input_ids"],
            )
            for row in encoded.select(range(min(num_shown, len(encoded))))
        ],
    )
