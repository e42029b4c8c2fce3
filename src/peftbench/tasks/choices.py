"""Choices: a question, possible answers and the right one."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from peftbench.data.readers.rows import Example, RowFault, to_printable
from peftbench.data.segments import Segment
from peftbench.tasks.base import Task, find_start_ids
from peftbench.tasks.completion import build_completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Choices(Task):
    """Questions with choices, judged by the log-likelihood of each choice after the prompt. Nothing is generated.

    A training sequence is ``[start] prompt separator choice [end]`` with the right choice. A prompt that is too
    long loses its start. The answer is the choice's text, its index from 0, or its letter.
    """

    metrics: ClassVar[tuple[str, ...]] = ("choice_accuracy",)
    headline_metric: ClassVar[str | None] = "accuracy"
    evaluation: ClassVar[Literal["generate", "choices", "loss"]] = "choices"

    kind: Literal["choices"] = "choices"
    """Kind of task."""
    prompt: str = "prompt"
    """Column with the question."""
    choices: str = "choices"
    """Column with the list of choices."""
    answer: str = "answer"
    """Column with the right choice: its text, its index from 0, or its letter (A, B, ...)."""
    separator: str = " "
    """Text between prompt and choice."""

    @property
    def columns(self) -> Mapping[str, str]:
        return {"prompt": self.prompt, "choices": self.choices, "answer": self.answer}

    @property
    def structured_columns(self) -> frozenset[str]:
        return frozenset({"choices", "answer"})

    def check_example(self, example: Example) -> RowFault | None:
        choices, advice = json.loads(example["choices"]), "write a list of at least two different texts"
        column = f"column {self.choices!r}"
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            return RowFault(f"has no list of texts in {column}", advice)
        if not all(choice.strip() for choice in choices):
            return RowFault(f"has an empty choice in {column}", advice)
        if len({choice.strip() for choice in choices}) < len(choices) or len(choices) < 2:
            return RowFault(f"has fewer than two different choices in {column}", advice)
        answer = json.loads(example["answer"])
        readings = find_answers(answer, choices)
        if len(set(readings.values())) == 1:
            return None
        shown = to_printable(str(answer))
        if readings:
            described = ", ".join(f"as {reading} it is choice {index}" for reading, index in readings.items())
            return RowFault(
                f"has the answer {shown!r}, which has two readings ({described})", "write the choice's text"
            )
        return RowFault(
            f"has the answer {shown!r}, which is not among its {len(choices)} choices",
            "write the choice's text, its index from 0, or its letter",
        )

    def build_segments(self, example: Example) -> Sequence[Segment]:
        return self._build_choice(example, self.get_reference(example))

    def render_choices(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Sequence[Sequence[Segment]]:
        start = Segment(ids=tuple(find_start_ids(tokenizer)))
        return [(start, *self._build_choice(example, choice)) for choice in self.get_choices(example)[0]]

    def _build_choice(self, example: Example, choice: str) -> Sequence[Segment]:
        return build_completion(
            (Segment(example["prompt"], cut="start"),), self.separator, choice.strip(), labels="completion"
        )

    def add_shots(self, example: Example, shots: Sequence[Example]) -> Example:
        solved = (f"{shot['prompt']}{self.separator}{self.get_reference(shot)}\n\n" for shot in shots)
        return {**example, "prompt": "".join(solved) + example["prompt"]}

    def get_prompt(self, example: Example) -> str:
        return example["prompt"]

    def get_reference(self, example: Example) -> str:
        choices, answer = self.get_choices(example)
        return choices[answer]

    def get_choices(self, example: Example) -> tuple[tuple[str, ...], int]:
        choices = tuple(json.loads(example["choices"]))
        return choices, next(iter(find_answers(json.loads(example["answer"]), choices).values()))


def find_answers(answer: object, choices: Sequence[str]) -> dict[str, int]:
    """Return the index of the right choice by each reading of ``answer``: text, index or letter."""
    readings: dict[str, int] = {}
    if isinstance(answer, bool) or not isinstance(answer, (str, int)):
        return readings
    text = str(answer).strip()
    stripped = [choice.strip() for choice in choices]
    if text in stripped:
        readings["text"] = stripped.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(choices):
        readings["index"] = int(text)
    if isinstance(answer, str) and len(text) == 1 and text.upper() in string.ascii_uppercase[: len(choices)]:
        readings["letter"] = string.ascii_uppercase.index(text.upper())
    return readings
