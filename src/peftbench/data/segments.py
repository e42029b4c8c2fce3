"""Segments: the parts of an example's sequence, as a task defines them, before they are token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from peftbench.data.readers.rows import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """A part of a sequence. Each segment is tokenized on its own."""

    text: str = ""
    is_label: bool = False
    """True if the loss includes its tokens."""
    is_template: bool = False
    """True if special tokens in the text are control tokens; False if everything in it is text."""
    cut: Literal["never", "start", "end"] = "never"
    """End from which its tokens are cut if the sequence is too long; never: it stays whole."""
    ids: tuple[int, ...] = ()
    """Token ids of a segment that is not text."""
    is_continuation: bool = field(default=False, kw_only=True)
    """True if the text follows on the previous segment without a space that the tokenizer would add."""


class RenderError(Exception):
    """An example that cannot be rendered: a clause on what is wrong with it, and what to do."""

    def __init__(self, content: str, advice: str) -> None:
        """Keep both parts for the error that names the example."""
        super().__init__(content)
        self.content, self.advice = content, advice


class Renderer(Protocol):
    """Turns examples into segments for one tokenizer."""

    def iter_variants(self, example: Example) -> Iterator[Sequence[Segment]]:
        """Yield the sequence of an example, longest first; each later one leaves out more of its context.

        Raises:
            RenderError: the example cannot be rendered.
        """


class RenderingTask(Protocol):
    """The part of a task that the encoder needs; :class:`peftbench.tasks.base.Task` has it."""

    def build_renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Return the renderer of the task's examples for a tokenizer."""

    def label_reference(self) -> RenderingTask:
        """Return the task with labels for the reference alone, so that they start where the prompt ends."""

    def render_choices(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Sequence[Sequence[Segment]]:
        """Return the sequence of the prompt with each of its choices; none if the task has no choices."""

    def get_choices(self, example: Example) -> tuple[tuple[str, ...], int]:
        """Return the choices and the index of the right one."""

    def model_dump_json(self) -> str:
        """Return the task's options, which are part of the cache's key."""
