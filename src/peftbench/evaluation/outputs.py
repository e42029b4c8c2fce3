"""outputs.jsonl: the model's output for every evaluated example. Metrics can be computed from it without the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from peftbench.common.filesystem import write_atomically
from peftbench.common.schema import RecordModel
from peftbench.errors import RecordError
from peftbench.run_dir.layout import RunDir

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.tasks.base import Task


class ChoiceScore(RecordModel):
    """Log-likelihood of one choice, given the prompt."""

    text: str
    log_likelihood: float
    """Sum over the tokens of the choice, in nats."""
    num_tokens: int
    num_bytes: int
    """Bytes of ``text`` in UTF-8, without what separates it from the prompt."""


class Output(RecordModel):
    """Output of the model for one evaluated example."""

    id: str
    reference: str
    """Expected text; of a task with choices, the text of the right choice."""
    generated: str | None = None
    """Generated text, None if the recipe does not generate."""
    teacher_forced: str | None = None
    """Most likely token at each position of the reference, None unless the recipe requests it."""
    choices: tuple[ChoiceScore, ...] | None = None
    """Log-likelihood of each choice; None if the task has no choices."""
    answer: int | None = None
    """Index of the right choice, from 0."""

    @property
    def prediction(self) -> str | None:
        """The generated text, or the most likely choice; None if there is neither."""
        if self.choices:
            return max(self.choices, key=lambda choice: choice.log_likelihood).text
        return self.generated


def build_choice_scores(choices: Sequence[str], index: int | None) -> tuple[ChoiceScore, ...]:
    """Return the scores of a prediction without probabilities: 0 for the predicted choice, -1 for the others."""
    return tuple(
        ChoiceScore(text=text, log_likelihood=-float(number != index), num_tokens=1, num_bytes=1)
        for number, text in enumerate(choices)
    )


@dataclass(frozen=True)
class Predictions:
    """The results of the model for the examples of a split, in its order; None for what was not requested."""

    generated: Sequence[str] | None = None
    teacher_forced: Sequence[str] | None = None
    choices: Sequence[tuple[ChoiceScore, ...]] | None = None


def build_outputs(dataset: Dataset, task: Task, predictions: Predictions) -> list[Output]:
    """Return the output of each example of a split, in its order."""
    missing = [None] * len(dataset)
    rows = dataset.select_columns(["id", *task.columns])
    columns = (predictions.generated, predictions.teacher_forced, predictions.choices)
    return [
        Output(
            id=row["id"],
            reference=task.get_reference(row),
            generated=generated,
            teacher_forced=teacher_forced,
            choices=choices,
            answer=None if choices is None else task.get_choices(row)[1],
        )
        for row, generated, teacher_forced, choices in zip(rows, *(one or missing for one in columns), strict=True)
    ]


def write_outputs(run_dir: Path, outputs: Sequence[Output]) -> None:
    """Write one JSON object per example, atomically.

    Raises:
        OutputError: they cannot be written.
    """
    lines = [json.dumps(output.model_dump(exclude_none=True), ensure_ascii=False) + "\n" for output in outputs]
    write_atomically(RunDir(run_dir).outputs_file, "".join(lines))


def read_outputs(run_dir: Path) -> list[Output]:
    """Return the outputs of a run, in the order of its evaluation split.

    Raises:
        RecordError: the run has none, or a line is not one.
    """
    path = RunDir(run_dir).outputs_file
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # not splitlines: a text may have U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}",
            "evaluate the model again, without --from-outputs",
        ) from error
    outputs = []
    for number, line in enumerate(lines, 1):
        try:
            outputs.append(Output.model_validate_json(line))
        except ValidationError as error:
            raise RecordError(
                f"line {number} of {path} is not an output with id and reference",
                "evaluate the model again, without --from-outputs",
            ) from error
    return outputs
