"""Completion: a prompt and the text that follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from peftbench.data.readers.rows import Example
from peftbench.data.segments import Segment
from peftbench.errors import OutOfRangeError
from peftbench.tasks.base import Task


class Completion(Task):
    """Prompts and completions. Nothing is added between them. A prompt that is too long loses its start.

    A sequence is ``[start] prompt separator completion [end]``.
    """

    metrics: ClassVar[tuple[str, ...]] = ("exact_match",)
    headline_metric: ClassVar[str | None] = "exact_match"

    kind: Literal["completion"] = "completion"
    """Kind of task."""
    prompt: str = "prompt"
    """Column with the prompt."""
    completion: str = "completion"
    """Column with the completion."""
    separator: str = ""
    """Text between prompt and completion, e.g. a space or a line break. Spaces at its end are labeled."""
    labels: Literal["completion", "all"] = "completion"
    """Tokens in the loss: those of the completion, or all."""

    @property
    def columns(self) -> Mapping[str, str]:
        return {"prompt": self.prompt, "completion": self.completion}

    def label_reference(self) -> Task:
        return self.model_copy(update={"labels": "completion"}) if self.labels == "all" else self

    def build_segments(self, example: Example) -> Sequence[Segment]:
        return build_completion(
            (Segment(example["prompt"], cut="start"),), self.separator, example["completion"], labels=self.labels
        )

    def add_shots(self, example: Example, shots: Sequence[Example]) -> Example:
        if self.labels == "all":
            raise OutOfRangeError(
                "method.kind=few_shot labels only completions, and task.labels=all labels prompts too",
                "set task.labels=completion in every run of the comparison",
            )
        solved = (f"{shot['prompt']}{self.separator}{shot['completion']}\n\n" for shot in shots)
        return {**example, "prompt": "".join(solved) + example["prompt"]}

    def get_prompt(self, example: Example) -> str:
        return example["prompt"]

    def get_reference(self, example: Example) -> str:
        return example["completion"]


def build_completion(
    prompt: Sequence[Segment], separator: str, completion: str, *, labels: Literal["completion", "all"]
) -> tuple[Segment, ...]:
    """Return the segments of a prompt, a separator and a labeled completion.

    Spaces at the separator's end go to the completion, since byte-level BPE puts a space into the next word's token.
    """
    stripped = separator.rstrip(" ")
    spaces = separator[len(stripped) :]
    between = (Segment(stripped, is_template=True),) if stripped else ()
    is_label = labels == "all"
    return (
        *(
            Segment(part.text, is_label, part.is_template, part.cut, is_continuation=index > 0)
            for index, part in enumerate((*prompt, *between))
        ),
        Segment(spaces + completion, is_label=True, is_continuation=True),
    )
