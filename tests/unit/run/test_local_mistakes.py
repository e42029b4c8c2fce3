"""Mistakes in local files are reported before anything waits for the network or is written."""

from __future__ import annotations

from typing import Any

import pytest

from peftbench.errors import EmptySplitError, MissingColumnError, PeftbenchError
from peftbench.methods.full import Full
from peftbench.run import runner
from peftbench.run.runner import Run
from peftbench.tasks.auto import Auto
from peftbench.tasks.chat import Chat
from peftbench.tasks.summarization import Summarization
from tests.helpers.workshop import Workshop


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"task": Summarization(summary="sumary")}, MissingColumnError),
        ({"task": Summarization(article="text")}, MissingColumnError),
        ({"task": Chat()}, MissingColumnError),
        ({"validation": None}, EmptySplitError),
        ({"train": "none.jsonl"}, PeftbenchError),
        ({"train": "none.jsonl", "task": Auto()}, PeftbenchError),
    ],
    ids=str,
)
def test_wrong_column_or_split_is_found_before_the_model_is_asked_for(
    changes: dict[str, Any], kind: type[PeftbenchError], workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not looked up, and no run folder is created."""

    def resolve(_: object) -> None:
        raise AssertionError("the model was asked for")

    monkeypatch.setattr(runner, "resolve_for_launch", resolve)
    parts = {name: value for name, value in changes.items() if name == "task"}
    source = workshop.source.model_copy(update={name: value for name, value in changes.items() if name not in parts})
    recipe = workshop.recipe(Full(), data={"source": source}, evaluate={"split": "validation"}, **parts)
    with pytest.raises(kind):
        Run(recipe)
    assert not workshop.output.joinpath("run").exists()
