"""Text: language modeling of whole documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from peftbench.data.readers.rows import Example
from peftbench.data.segments import Segment
from peftbench.tasks.base import Task


class Text(Task):
    """Documents for language modeling: every token is labeled. A document that is too long loses its end.

    A sequence is ``[start] text [end]``.
    """

    evaluation: ClassVar[Literal["generate", "choices", "loss"]] = "loss"
    labels_whole_row: ClassVar[bool] = True

    kind: Literal["text"] = "text"
    """Kind of task."""
    text: str = "text"
    """Column with the document."""

    @property
    def columns(self) -> Mapping[str, str]:
        return {"text": self.text}

    def build_segments(self, example: Example) -> Sequence[Segment]:
        return (Segment(example["text"], is_label=True, cut="end"),)

    def get_prompt(self, example: Example) -> str:
        return ""

    def get_reference(self, example: Example) -> str:
        return example["text"]
