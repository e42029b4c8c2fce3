"""The metrics of a recipe: names, headline metric, libraries and functions of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from peftbench.errors import MetricError, OutOfRangeError, PeftbenchError, UnknownKeyError
from peftbench.evaluation.metrics import base
from peftbench.evaluation.metrics.selection import (
    check_metrics,
    generates_text,
    select_headline_metric,
    select_metrics,
)
from peftbench.evaluation.metrics.user_function import UserFunction
from peftbench.methods.full import Full
from peftbench.recipe.schema import Recipe
from peftbench.tasks import TASKS
from peftbench.tasks.auto import Auto
from tests.helpers.recipe_files import REQUIRED_KEYS

MODULE = """
def length(predictions, references):
    return [len(text) for text in predictions]

def distance(predictions, references):
    return [abs(len(text) - len(other)) for text, other in zip(predictions, references)]

distance.higher_is_better = False

def both(predictions, references):
    return [{"tokens": len(text.split()), "letters": len(text)} for text in predictions]

def short(predictions, references):
    return [1.0]

def broken(predictions, references):
    raise KeyError("no such token")

def texts(predictions, references):
    return predictions

def infinite(predictions, references):
    return [float("inf") for _ in predictions]

def unequal(predictions, references):
    return [{"a": 1}, {"b": 1}]

number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write a module with functions to the working directory, and return its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_metrics_of_test.py").write_text(MODULE, encoding="utf-8")
    yield "user_metrics_of_test"
    sys.modules.pop("user_metrics_of_test", None)


def build_recipe(**evaluate: Any) -> Recipe:
    """Return a recipe with these keys of ``evaluate``."""
    sections = {"method": Full().model_dump(), "task": {"kind": "summarization"}, "evaluate": evaluate}
    return Recipe.model_validate(REQUIRED_KEYS | sections)


def test_null_selects_the_metrics_of_the_task() -> None:
    """The task's own metrics and headline metric are used unless the recipe names others."""
    assert [metric.name for metric in select_metrics(build_recipe())] == ["rouge"]
    assert generates_text(build_recipe())
    assert select_headline_metric(build_recipe(), ["rouge1", "rougeL"]) == "rougeL"
    assert select_headline_metric(build_recipe(), ["bleu", "chrf"]) == "bleu"
    assert select_headline_metric(build_recipe(headline_metric="chrf"), ["bleu", "chrf"]) == "chrf"
    assert select_headline_metric(build_recipe(headline_metric="chrf"), ["rougeL"]) is None
    assert select_headline_metric(build_recipe(), []) is None


def test_metrics_of_an_unresolved_task_are_not_refused() -> None:
    """Before its columns are known, its metrics are not, so that the headline metric cannot be checked."""
    recipe = build_recipe(headline_metric="rougeL").model_copy(update={"task": Auto()})
    check_metrics(recipe)
    assert generates_text(recipe)


def test_only_metrics_of_text_generate() -> None:
    """No metrics, or metrics of losses and choices, need no generation."""
    assert not generates_text(build_recipe(metrics=[]))
    assert not generates_text(build_recipe(metrics=["perplexity", "choice_accuracy"]))
    assert generates_text(build_recipe(metrics=["perplexity", "exact_match"]))
    assert generates_text(build_recipe(metrics=["no_such_module:function"]))  # not imported


def test_repeated_metric_is_computed_once() -> None:
    """Names are unique in the record."""
    names = [metric.name for metric in select_metrics(build_recipe(metrics=["bleu", "chrf", "bleu"]))]
    assert names == ["bleu", "chrf"]


@pytest.mark.parametrize(
    ("keys", "error_class", "message"),
    [
        (
            {"metrics": ["exact"]},
            UnknownKeyError,
            "there is no metric 'exact'; did you mean 'exact_match'?",
        ),
        ({"metrics": ["rougeL"]}, UnknownKeyError, "did you mean 'rouge'?"),
        ({"metrics": [":"]}, UnknownKeyError, "there is no metric ':'"),
        (
            {"headline_metric": "rogueL"},
            OutOfRangeError,
            "evaluate.headline_metric=rogueL is not a score of the recipe's metrics; did you mean 'rougeL'?",
        ),
        ({"metrics": ["bleu"], "headline_metric": "rougeL"}, OutOfRangeError, "allowed: bleu"),
        (
            {"metrics": [], "headline_metric": "rougeL"},
            OutOfRangeError,
            "set evaluate.metrics, or evaluate.headline_metric=null",
        ),
        ({"metrics": [], "teacher_forced": True}, OutOfRangeError, "evaluate.teacher_forced=true needs a metric"),
        ({"metrics": ["no_such:function"]}, MetricError, "no_such:function cannot be imported: ModuleNotFoundError"),
        ({"metrics": ["math:no_such"]}, MetricError, "is not a function: math has no function 'no_such'"),
    ],
)
def test_invalid_metrics_are_refused(keys: dict[str, Any], error_class: type[PeftbenchError], message: str) -> None:
    """One sentence names the key and the nearest valid name."""
    with pytest.raises(error_class) as caught:
        check_metrics(build_recipe(**keys))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_library_is_refused_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the command that installs it; nothing was loaded."""
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "sacrebleu" else find_spec(name))
    with pytest.raises(MetricError, match=r"the metric chrf needs the package sacrebleu.*; pip install sacrebleu, or"):
        check_metrics(build_recipe(metrics=["exact_match", "chrf"]))


def test_user_function_gives_scores_under_its_name(user_module: str) -> None:
    """A number is one score, a dict one score per key; the direction is an attribute of the function."""
    recipe = build_recipe(metrics=[f"{user_module}:length", f"{user_module}:distance", f"{user_module}:both"])
    check_metrics(recipe)
    length, distance, both = select_metrics(recipe)
    assert isinstance(length, UserFunction)
    assert isinstance(distance, UserFunction)
    assert isinstance(both, UserFunction)
    assert length.score_texts(["ab", "c d"], ["", "x"]) == {f"{user_module}:length": (2.0, 3.0)}
    assert distance.score_texts(["ab", "c d"], ["", "x"]) == {f"{user_module}:distance": (2.0, 2.0)}
    assert both.score_texts(["ab", "c d"], ["", "x"]) == {
        f"{user_module}:both/tokens": (1.0, 2.0),
        f"{user_module}:both/letters": (2.0, 3.0),
    }
    scores = dict(length.scores) | dict(distance.scores) | dict(both.scores)
    assert [score.title for score in scores.values()] == ["length", "distance", "both/tokens", "both/letters"]
    assert [score.higher_is_better for score in scores.values()] == [True, False, True, True]


def test_user_function_may_be_the_headline_metric(user_module: str) -> None:
    """So may a key of the dicts that it returns, which are not known before it is called."""
    name = f"{user_module}:both"
    for headline in (name, f"{name}/tokens"):
        check_metrics(build_recipe(metrics=[name], headline_metric=headline))
    with pytest.raises(OutOfRangeError, match="is not a score"):
        check_metrics(build_recipe(metrics=[name], headline_metric=f"{user_module}:length"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "short",
            "returned a list of length 1 for 2 examples; return one number, or one dict of numbers, for each example",
        ),
        ("broken", "failed: KeyError: 'no such token'; correct it"),
        ("texts", "returned 'a' for example 1; return a finite number for each example"),
        ("infinite", "returned inf for example 1"),
        ("unequal", "returned {'b': 1} for example 2"),
        ("number", "is not a function"),
    ],
)
def test_faulty_user_function_is_one_sentence(function: str, message: str, user_module: str) -> None:
    """The sentence names the function and what it did."""
    with pytest.raises(MetricError) as caught:
        UserFunction(f"{user_module}:{function}").score_texts(["a", "b"], ["c", "d"])
    assert f"the metric {user_module}:{function} {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_user_module_that_cannot_be_imported_is_one_sentence(user_module: str, tmp_path: Path) -> None:
    """An error in the module is reported with its type."""
    (tmp_path / "faulty_metric_of_test.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(MetricError, match=r"cannot be imported: ZeroDivisionError: division by zero"):
        check_metrics(build_recipe(metrics=["faulty_metric_of_test:function"]))


@pytest.mark.parametrize(
    ("task", "metric", "need"),
    [
        ("completion", "choice_accuracy", "log-likelihoods of choices"),
        ("text", "rouge", "generated text"),
        ("choices", "exact_match", "generated text"),
    ],
)
def test_metric_that_the_task_cannot_serve_is_refused(task: str, metric: str, need: str) -> None:
    """It would fail after the training."""
    recipe = build_recipe(metrics=[metric]).model_copy(update={"task": TASKS[task].with_defaults()})
    with pytest.raises(OutOfRangeError, match=f"{metric}, which needs {need}, and task.kind={task} has none"):
        check_metrics(recipe)
    check_metrics(build_recipe(metrics=["perplexity"]).model_copy(update={"task": TASKS[task].with_defaults()}))
