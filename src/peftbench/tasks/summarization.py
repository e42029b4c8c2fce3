"""Summarization: an article and its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import field_validator

from peftbench.data.readers.rows import Example
from peftbench.data.segments import Segment
from peftbench.tasks.base import Task

_COLUMN_PAIRS = (("article", "summary"), ("article", "highlights"), ("document", "summary"), ("dialogue", "summary"))


class Summarization(Task):
    """Summaries of articles. An article that is too long loses its end.

    A sequence is ``[start] article separator summary [end]``, with a space before the summary.
    """

    metrics: ClassVar[tuple[str, ...]] = ("rouge",)
    headline_metric: ClassVar[str | None] = "rougeL"

    kind: Literal["summarization"] = "summarization"
    """Kind of task."""
    article: str = "article"
    """Column with the text to summarize."""
    summary: str = "summary"
    """Column with the summary."""
    separator: str = "\nTL;DR:"
    """Text between article and summary; a space follows. Byte-level BPE puts that space into the next word's token."""

    @field_validator("separator")
    @classmethod
    def _check_separator(cls, value: str) -> str:
        if not value or value != value.rstrip(" "):
            raise ValueError("must be non-empty text that does not end in a space")
        return value

    @property
    def columns(self) -> Mapping[str, str]:
        return {"article": self.article, "summary": self.summary}

    @classmethod
    def match(cls, names: Sequence[str]) -> Task | None:
        pairs = (pair for pair in _COLUMN_PAIRS if set(pair) <= set(names))
        return next((cls(article=article, summary=summary) for article, summary in pairs), None)

    def build_segments(self, example: Example) -> Sequence[Segment]:
        return (
            Segment(example["article"], cut="end"),
            Segment(self.separator, is_template=True),
            Segment(" " + example["summary"].strip(), is_label=True, is_continuation=True),
        )

    def get_prompt(self, example: Example) -> str:
        return example["article"]

    def get_reference(self, example: Example) -> str:
        return example["summary"]
