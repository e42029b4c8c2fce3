"""The base class of tasks: what an example is, how it becomes tokens and labels, and what is evaluated.

Everything specific to one task is in its class; no code outside this folder tests which task it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from peftbench.common.schema import ConfigSection
from peftbench.data.readers.rows import Columns, Example, RowFault
from peftbench.data.segments import Renderer, Segment
from peftbench.errors import OutOfRangeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Task(ConfigSection):
    """A task's options. Each subclass gives ``kind`` a literal type, by which a recipe selects it."""

    metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that judge the task unless the recipe names others (``evaluate.metrics``)."""
    headline_metric: ClassVar[str | None] = None
    """Score by which runs are compared; None: held-out loss."""
    evaluation: ClassVar[Literal["generate", "choices", "loss"]] = "generate"
    """Evaluation in addition to held-out loss: generated text, choices by log-likelihood, or nothing."""
    is_resolved: ClassVar[bool] = True
    """False for ``auto``, whose metrics are not known before the columns are."""
    labels_whole_row: ClassVar[bool] = False
    """True if every token of a row is labeled."""

    kind: str
    """Kind of task."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Name of the file's column by the task's name for it; the default names are the convention of TRL."""
        raise NotImplementedError

    @property
    def structured_columns(self) -> frozenset[str]:
        """Columns (the task's names) that hold lists or objects."""
        return frozenset()

    @property
    def optional_columns(self) -> frozenset[str]:
        """Columns (the task's names) whose cells may be empty."""
        return frozenset()

    @classmethod
    def with_defaults(cls) -> Self:
        """Return the task with every key at its default."""
        return cls.model_validate({})

    @classmethod
    def match(cls, names: Sequence[str]) -> Task | None:
        """Return the task for a file with these columns, None if it is not of this kind."""
        task = cls.with_defaults()
        return task if set(task.columns.values()) <= set(names) else None

    def select_columns(self, id_column: str | None) -> Columns:
        """Return the columns to read."""
        return Columns(
            self.columns, id_column, self.structured_columns, self.optional_columns, check=self.check_example
        )

    def check_example(self, example: Example) -> RowFault | None:
        """Return what is wrong with an example whose cells have the right type, None if nothing is."""
        return None

    def build_renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Return the renderer of this task's examples for a tokenizer.

        Raises:
            PeftbenchError: the tokenizer lacks what the task needs.
        """
        return PlainRenderer(self, tokenizer)

    def find_chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Return the chat template that the recipe names, None if it names none or the task has no chats.

        Raises:
            PeftbenchError: it cannot be read.
        """
        return None

    def label_reference(self) -> Task:
        """Return the task with labels for the reference alone, so that they start where the prompt ends."""
        return self

    def build_segments(self, example: Example) -> Sequence[Segment]:
        """Return the segments of an example, without the tokenizer's start token and without an end token."""
        raise NotImplementedError

    def get_prompt(self, example: Example) -> str:
        """Return the text that the model is given."""
        raise NotImplementedError

    def get_reference(self, example: Example) -> str:
        """Return the expected text."""
        raise NotImplementedError

    def add_shots(self, example: Example, shots: Sequence[Example]) -> Example:
        """Return the example with solved examples before its prompt, which are not labeled.

        Raises:
            OutOfRangeError: the task has no such prompts.
        """
        raise OutOfRangeError(f"method.kind=few_shot does not support task.kind={self.kind}", "use zero_shot")

    def render_choices(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Sequence[Sequence[Segment]]:
        """Return the sequence of the prompt with each of its choices; none if the task has no choices."""
        return ()

    def get_choices(self, example: Example) -> tuple[tuple[str, ...], int]:
        """Return the choices and the index of the right one, for a task whose ``evaluation`` is "choices"."""
        raise NotImplementedError


class PlainRenderer:
    """Puts the tokenizer's start token before an example's segments, and a labeled end token after them."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take over the tokenizer's special tokens."""
        self._task = task
        self._start = Segment(ids=tuple(find_start_ids(tokenizer)))
        self._end = Segment(ids=(tokenizer.eos_token_id,), is_label=True)

    def iter_variants(self, example: Example) -> Iterator[Sequence[Segment]]:
        """Yield the only variant: its segments are cut where it is too long."""
        yield (self._start, *self._task.build_segments(example), self._end)


def find_start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer adds before every text: a start token for Llama, none for GPT-2."""
    # Found by position, not by id: in some models (OPT) the start token is also the end token.
    with_special = list(tokenizer("a", verbose=False)["input_ids"])
    text = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    starts = (start for start in range(len(with_special)) if with_special[start : start + len(text)] == text)
    return with_special[: next(starts, 0)]
