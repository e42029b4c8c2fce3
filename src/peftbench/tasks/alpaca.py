"""Alpaca: an instruction, an optional input, and the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from peftbench.data.readers.rows import Example
from peftbench.data.segments import Segment
from peftbench.tasks.base import Task
from peftbench.tasks.completion import build_completion

# The prompts of Stanford Alpaca (Taori et al. 2023), without and with an input.
_INTRODUCTION = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
_PROMPT = f"{_INTRODUCTION}. {_REQUEST}\n\n### Instruction:\n"
_PROMPT_WITH_INPUT = (
    f"{_INTRODUCTION}, paired with an input that provides further context. {_REQUEST}\n\n### Instruction:\n"
)


class Alpaca(Task):
    """Instructions in the prompt of Stanford Alpaca (Taori et al. 2023). An input that is too long loses its end."""

    metrics: ClassVar[tuple[str, ...]] = ("rouge",)
    headline_metric: ClassVar[str | None] = "rougeL"

    kind: Literal["alpaca"] = "alpaca"
    """Kind of task."""
    instruction: str = "instruction"
    """Column with the instruction."""
    input: str | None = "input"
    """Column with further input, whose cells may be empty; null: none."""
    output: str = "output"
    """Column with the expected output."""

    @property
    def columns(self) -> Mapping[str, str]:
        middle = {} if self.input is None else {"input": self.input}
        return {"instruction": self.instruction, **middle, "output": self.output}

    @property
    def optional_columns(self) -> frozenset[str]:
        return frozenset({"input"})

    @classmethod
    def match(cls, names: Sequence[str]) -> Task | None:
        if not {"instruction", "output"} <= set(names):
            return None
        return cls(input="input" if "input" in names else None)

    def build_segments(self, example: Example) -> Sequence[Segment]:
        text = example.get("input", "")
        middle = (Segment("\n\n### Input:\n", is_template=True), Segment(text, cut="end")) if text.strip() else ()
        prompt = (
            Segment(_PROMPT_WITH_INPUT if middle else _PROMPT, is_template=True),
            Segment(example["instruction"], cut="never" if middle else "end"),
            *middle,
        )
        return build_completion(prompt, "\n\n### Response:\n", example["output"], labels="completion")

    def get_prompt(self, example: Example) -> str:
        return "\n\n".join(filter(str.strip, (example["instruction"], example.get("input", ""))))

    def get_reference(self, example: Example) -> str:
        return example["output"]
