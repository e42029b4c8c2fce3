"""outputs.jsonl: the model's output for every evaluated example. Metrics can be computed from it without the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from peftbench.common.filesystem import write_atomically
from peftbench.common.schema import RecordModel
from peftbench.errors import RecordError
from peftbench.run_dir.layout import RunDir

if TYPE_CHECKING:
    from datasets import Dataset


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


def build_outputs(
    dataset: Dataset, generated: Sequence[str] | None, teacher_forced: Sequence[str] | None
) -> list[Output]:
    """Return the output of each example of a split, in its order."""
    missing = [None] * len(dataset)
    columns = (dataset["id"], dataset["summary"], generated or missing, teacher_forced or missing)
    return [
        Output(id=id, reference=reference, generated=text, teacher_forced=forced)
        for id, reference, text, forced in zip(*columns, strict=True)
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
