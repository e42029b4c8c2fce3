"""Number of labeled tokens in a row, which a memory plan assumes: from the task, or from the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from peftbench.data.encode import count_labels
from peftbench.errors import PeftbenchError
from peftbench.memory.families import with_bundled_config
from peftbench.training.data import load_split
from peftbench.training.data_summary import build_split_encoder

if TYPE_CHECKING:
    from peftbench.data.encode import Encoder
    from peftbench.recipe.schema import Recipe


class LabelCount(NamedTuple):
    """Labeled tokens of a row, and where the number is from."""

    tokens: int
    source: str
    """Clause for the plan's notes."""


_known_count: ContextVar[LabelCount | None] = ContextVar("_known_count", default=None)


@contextmanager
def with_label_count(count: LabelCount) -> Iterator[None]:
    """Plan rows with this number of labeled tokens: the data were read before, and are not read for each plan."""
    token = _known_count.set(count)
    try:
        yield
    finally:
        _known_count.reset(token)


def count_labeled_tokens(recipe: Recipe, sequence_length: int) -> LabelCount:
    """Return the most labeled tokens of a row of ``sequence_length`` tokens; its first token is never predicted.

    It is the maximum in the data if the data are local and the tokenizer is available. Otherwise it is all tokens.
    """
    every = sequence_length - 1
    if recipe.task.labels_whole_row:
        return LabelCount(every, "this task labels every token")
    if recipe.data.label_padding:
        return LabelCount(every, "data.label_padding labels every token")
    if (known := _known_count.get()) is not None:
        return LabelCount(max(1, min(known.tokens, every)), known.source)
    longest = _find_most_labels(recipe)
    if longest is None:
        return LabelCount(every, "every token, since the data were not read")
    return LabelCount(max(1, min(longest, every)), "the most in the data")


def _find_most_labels(recipe: Recipe) -> int | None:
    """Return the most labeled tokens of an example that fits; None without one, or if it cannot be encoded here."""
    if not recipe.task.is_resolved or not recipe.data.source.is_local:
        return None
    with with_bundled_config(recipe.model) as model:
        if model is not recipe.model:  # only the config is bundled
            return None
    sections = recipe.model_dump_json(include={"data", "task", "model", "evaluate"})
    return _count_cached(_Key(sections, recipe.method.virtual_tokens, _find_splits(recipe)), recipe)


class _Key(NamedTuple):
    """Everything that the number depends on."""

    sections: str
    virtual_tokens: int
    splits: tuple[str, ...]


_counts: dict[_Key, int | None] = {}


def _count_cached(key: _Key, recipe: Recipe) -> int | None:
    if key not in _counts:
        _counts[key] = _count_in_data(recipe)
    return _counts[key]


def _count_in_data(recipe: Recipe) -> int | None:
    try:
        encoder = build_split_encoder(recipe)
        return max(_find_most_in_split(recipe, encoder, split) for split in _find_splits(recipe)) or None
    except PeftbenchError:  # a plan needs no data; a run reports what is wrong with them
        return None


def _find_splits(recipe: Recipe) -> tuple[str, ...]:
    return (recipe.evaluate.split, *(["train"] if recipe.method.is_trainable else []))


def _find_most_in_split(recipe: Recipe, encoder: Encoder, split: str) -> int:
    encoded = encoder.encode_all(load_split(recipe, split), split)
    rows = zip(encoded["label_spans"], encoded["needed"], strict=True)
    return max((count_labels(spans) for spans, needed in rows if needed <= encoder.layout.max_length), default=0)
