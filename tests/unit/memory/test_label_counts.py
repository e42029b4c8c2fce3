"""The number of labeled tokens that a memory plan assumes, and where it is from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from peftbench.data.sources import Files
from peftbench.memory.label_counts import count_labeled_tokens
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.full import Full
from peftbench.modeling.loading import load_tokenizer
from peftbench.recipe.schema import Recipe
from peftbench.tasks import TASKS
from peftbench.tasks.auto import Auto
from tests.helpers.workshop import Workshop

WIDTH = 48
NOT_READ = (WIDTH - 1, "every token, since the data were not read")
SUMMARIES = {"train": ("one", "the river rose by a metre"), "test": ("a new bridge, of stone and steel, is up", "x")}


@pytest.fixture
def recipe(workshop: Workshop, tmp_path: Path) -> Recipe:
    """Return a recipe over two examples a split."""
    for split, summaries in SUMMARIES.items():
        lines = [json.dumps({"article": "The town.", "summary": summary}) for summary in summaries]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = Files(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    return workshop.recipe(Full(), data={"source": source, "max_length": WIDTH})


def count_tokens(recipe: Recipe, summary: str) -> int:
    """Return the tokens of a summary with the space before it and the end token after it."""
    return len(load_tokenizer(recipe.model)(" " + summary)["input_ids"]) + 1


def test_most_labels_of_both_splits_are_counted(recipe: Recipe) -> None:
    """A summary of the evaluated split counts too, and a row is the limit."""
    longest = count_tokens(recipe, SUMMARIES["test"][0])
    assert longest > count_tokens(recipe, SUMMARIES["train"][1])
    assert count_labeled_tokens(recipe, WIDTH) == (longest, "the most in the data")
    assert count_labeled_tokens(recipe, longest).tokens == longest - 1


def test_training_split_of_a_baseline_is_not_counted(recipe: Recipe, tmp_path: Path) -> None:
    """Only the evaluated split matters, so that the other file may be missing."""
    (tmp_path / "train.jsonl").unlink()
    baseline = recipe.model_copy(update={"method": ZeroShot()})
    assert count_labeled_tokens(baseline, WIDTH).tokens == count_tokens(recipe, SUMMARIES["test"][0])
    assert count_labeled_tokens(recipe, WIDTH) == NOT_READ


def test_every_token_counts_without_a_tokenizer(recipe: Recipe, tmp_path: Path) -> None:
    """For a folder with only a config, transformers builds an empty tokenizer."""
    folder = tmp_path / "config_only"
    folder.mkdir()
    shutil.copy(Path(recipe.model.path) / "config.json", folder)
    model = recipe.model.model_copy(update={"path": str(folder)})
    assert count_labeled_tokens(recipe.model_copy(update={"model": model}), WIDTH) == NOT_READ


def test_every_token_counts_if_no_example_fits(recipe: Recipe, tmp_path: Path) -> None:
    """A run refuses or drops such examples; a plan is still made."""
    for split in SUMMARIES:
        row = {"article": "a", "summary": "a long summary " * WIDTH}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert count_labeled_tokens(recipe, WIDTH) == NOT_READ


def test_every_token_counts_for_an_unknown_task(recipe: Recipe) -> None:
    """Without columns, auto cannot be resolved."""
    assert count_labeled_tokens(recipe.model_copy(update={"task": Auto()}), WIDTH) == NOT_READ


def test_settings_that_label_every_token_are_named(recipe: Recipe) -> None:
    """The data are not read."""
    text = recipe.model_copy(update={"task": TASKS["text"].with_defaults()})
    assert count_labeled_tokens(text, WIDTH) == (WIDTH - 1, "this task labels every token")
    padded = recipe.model_copy(update={"data": recipe.data.model_copy(update={"label_padding": True})})
    assert count_labeled_tokens(padded, WIDTH) == (WIDTH - 1, "data.label_padding labels every token")
