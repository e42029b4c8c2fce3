"""task.kind=auto: the task that the columns of a file imply."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from peftbench.data.sources import Docstrings, Files
from peftbench.data.synthetic import Synthetic
from peftbench.errors import DataError, EmptySplitError, OutOfRangeError
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.lora import Lora
from peftbench.tasks import TASK_KINDS, TASKS
from peftbench.tasks.alpaca import Alpaca
from peftbench.tasks.auto import Auto, select_task
from peftbench.tasks.base import Task
from peftbench.tasks.chat import Chat
from peftbench.tasks.choices import Choices
from peftbench.tasks.completion import Completion
from peftbench.tasks.summarization import Summarization
from peftbench.tasks.text import Text
from peftbench.training.auto_settings import resolve_task
from tests.helpers.workshop import Workshop

ROWS: list[tuple[dict[str, Any], Task]] = [
    ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, Chat()),
    ({"prompt": "a", "completion": "b"}, Completion()),
    ({"instruction": "a", "output": "b"}, Alpaca(input=None)),
    ({"instruction": "a", "input": "c", "output": "b"}, Alpaca()),
    ({"prompt": "a", "choices": ["b", "c"], "answer": "b"}, Choices()),
    ({"text": "a"}, Text()),
    ({"article": "a", "summary": "b"}, Summarization()),
    ({"article": "a", "highlights": "b"}, Summarization(summary="highlights")),
    ({"dialogue": "a", "summary": "b"}, Summarization(article="dialogue")),
    # With the columns of several tasks, the first task in the registry counts.
    ({"text": "t", "messages": [], "prompt": "a", "completion": "b"}, Chat()),
    ({"text": "t", "prompt": "a", "completion": "b"}, Completion()),
    ({"text": "t", "instruction": "a", "output": "b"}, Alpaca(input=None)),
]
SUFFIXES = (".jsonl", ".csv", ".parquet")


def write(path: Path, row: dict[str, Any]) -> str:
    """Write one row with a column that no task has, and return the file's name."""
    row = {"source": "x", **row}
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(
                [row, [one if isinstance(one, str) else json.dumps(one) for one in row.values()]]
            )
    else:
        parquet.write_table(pyarrow.table({name: [value] for name, value in row.items()}), path)
    return str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("row", "task"), ROWS)
def test_columns_imply_the_task(
    row: dict[str, Any], task: Task, suffix: str, workshop: Workshop, tmp_path: Path
) -> None:
    """The note has the task and its columns."""
    source = Files(train=write(tmp_path / f"rows{suffix}", row))
    recipe = workshop.recipe(Lora(), data={"source": source}, task=Auto())
    resolved, notes = resolve_task(recipe)
    assert resolved.task == task
    assert resolved == recipe.model_copy(update={"task": task})
    assert notes == [f"auto: task.kind is {task.kind} (columns {', '.join(task.columns.values())})"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_of_no_task_are_refused_in_one_sentence(suffix: str, workshop: Workshop, tmp_path: Path) -> None:
    """The error has the columns, an example of the keys to set, and the columns of each task."""
    source = Files(train=write(tmp_path / f"rows{suffix}", {"question": "a", "reply": "b"}))
    with pytest.raises(OutOfRangeError) as error:
        resolve_task(workshop.recipe(Lora(), data={"source": source}, task=Auto()))
    assert str(error.value) == (
        "task.kind=auto finds no task for the columns of the train split (source, question, reply); set task.kind and "
        "name its columns, e.g. task.kind=completion task.prompt=COLUMN task.completion=COLUMN (columns by task: "
        "chat: messages; completion: prompt + completion; alpaca: instruction + input + output; choices: prompt + "
        "choices + answer; text: text; summarization: article + summary)"
    )


def test_only_the_first_columns_of_a_wide_file_are_listed() -> None:
    """Otherwise the sentence would be too long to read."""
    with pytest.raises(OutOfRangeError) as error:
        select_task([f"c{index}" for index in range(30)], TASKS, "it")
    assert "c19)" in str(error.value)
    assert "c20" not in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_empty_file_is_refused(suffix: str, workshop: Workshop, tmp_path: Path) -> None:
    """It has no columns."""
    (tmp_path / f"rows{suffix}").write_text("", encoding="utf-8")
    source = Files(train=str(tmp_path / f"rows{suffix}"))
    with pytest.raises(EmptySplitError, match=r"rows\.\w+ has no examples"):
        resolve_task(workshop.recipe(Lora(), data={"source": source}, task=Auto()))


def test_damaged_parquet_file_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    """The error names the file."""
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no footer")
    source = Files(train=str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as parquet"):
        resolve_task(workshop.recipe(Lora(), data={"source": source}, task=Auto()))


@pytest.mark.parametrize("source", [Docstrings(), Synthetic(examples=4)], ids=lambda source: source.kind)
def test_own_sources_imply_their_task(source: Docstrings | Synthetic, workshop: Workshop) -> None:
    """Their columns need not be read."""
    assert resolve_task(workshop.recipe(Lora(), data={"source": source}, task=Auto()))[0].task == Summarization()


def test_baseline_reads_the_columns_of_the_evaluated_split(workshop: Workshop, tmp_path: Path) -> None:
    """It does not need the training split."""
    source = Files(train=str(tmp_path / "none.jsonl"), test=write(tmp_path / "rows.jsonl", {"text": "a"}))
    assert resolve_task(workshop.recipe(ZeroShot(), data={"source": source}, task=Auto()))[0].task == Text()


@pytest.mark.parametrize("kind", TASKS)
def test_named_task_is_kept(kind: str, workshop: Workshop) -> None:
    """The columns are not read, and there is no note."""
    recipe = workshop.recipe(Lora(), task=TASKS[kind].with_defaults())
    assert resolve_task(recipe) == (recipe, [])


def test_each_kind_is_its_key() -> None:
    """The default of each class's kind is its key in the registry, and a task reads at least one column."""
    assert set(TASK_KINDS) == {"auto", *TASKS}
    assert all(task.model_fields["kind"].default == kind for kind, task in TASK_KINDS.items())
    for kind in TASKS:
        task = TASKS[kind].with_defaults()
        assert task.columns
        assert task.structured_columns | task.optional_columns <= set(task.columns)


def test_scored_tasks_have_metrics_and_a_headline(describe: Callable[[Task], tuple[bool, bool]]) -> None:
    """A task without an evaluation beyond the loss has neither."""
    assert {kind: describe(TASKS[kind].with_defaults()) for kind in TASKS} == {
        kind: (kind != "text",) * 2 for kind in TASKS
    }


@pytest.fixture
def describe() -> Callable[[Task], tuple[bool, bool]]:
    """Return a function that returns whether a task has metrics and a headline metric."""
    return lambda task: (bool(task.metrics), task.headline_metric is not None)
