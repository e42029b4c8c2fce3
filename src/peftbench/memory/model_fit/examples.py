"""Lengths and labels of the examples in a file, which the rows of ``peftbench fit MODEL --data FILE`` have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.data.local_files import find_format, list_formats
from peftbench.errors import DataError, HubUnreachableError, ModelNotFoundError
from peftbench.memory.label_counts import LabelCount

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe


@dataclass(frozen=True)
class ExampleLengths:
    """Lengths of a file's examples in tokens of the model's tokenizer."""

    num_examples: int
    longest: int
    """Tokens of the longest example, at most the length limit."""
    mean: float
    labels: LabelCount
    """The most labeled tokens of an example."""


def check_data_file(name: str) -> None:
    """Check the format of a file by its name.

    Raises:
        DataError: it has another format.
    """
    if find_format(Path(name)) is None:
        raise DataError(f"--data {name} must be a file that ends in {list_formats()}; convert it to JSON lines")


def measure_examples(recipe: Recipe, model_path: str) -> tuple[ExampleLengths | None, str]:
    """Return the lengths of the training split in tokens of the model at ``model_path``, and a note.

    None in place of the lengths if that model has no tokenizer here.

    Raises:
        DataError: the file does not exist, or an example is not usable.
        RecipeError: the columns are those of no task.
    """
    from peftbench.training.auto_settings import resolve_task, with_model_keys
    from peftbench.training.data_summary import build_split_encoder, summarize_split

    recipe, notes = resolve_task(with_model_keys(recipe, path=model_path))
    try:
        encoder = build_split_encoder(recipe)
    except (ModelNotFoundError, HubUnreachableError):
        return None, (
            "the examples are not measured: the model's tokenizer was found neither in a folder nor on the Hub; "
            "rows have the length of --max-length, and all their tokens are labeled"
        )
    summary = summarize_split(recipe, encoder, "train", 0)
    lengths = [min(length, summary.max_length) for length in summary.lengths]
    labels = LabelCount(max(summary.num_labels, default=1), "the most in the data")
    note = "; ".join(note.removeprefix("auto: ") for note in notes)
    return ExampleLengths(len(lengths), max(lengths), sum(lengths) / len(lengths), labels), note
