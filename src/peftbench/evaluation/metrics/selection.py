"""The metrics and the headline metric of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftbench.errors import OutOfRangeError, UnknownKeyError, did_you_mean
from peftbench.evaluation.metrics.base import NEED_NAMES, Metric
from peftbench.evaluation.metrics.registry import METRICS
from peftbench.evaluation.metrics.user_function import SEPARATOR, UserFunction

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe


def select_metrics(recipe: Recipe) -> list[Metric]:
    """Return the metrics of a recipe: those of ``evaluate.metrics``, or the task's own.

    Raises:
        UnknownKeyError: there is no such metric; the message names the nearest.
    """
    names = recipe.task.metrics if recipe.evaluate.metrics is None else recipe.evaluate.metrics
    return build_metrics(names, "evaluate.metrics")


def build_metrics(names: Sequence[str], source: str) -> list[Metric]:
    """Return the metrics of these names, each once. ``source`` is where the names are from, for errors.

    Raises:
        UnknownKeyError: there is no such metric; the message names the nearest.
    """
    metrics: list[Metric] = []
    for name in dict.fromkeys(names):
        if SEPARATOR in name.strip(SEPARATOR):
            metrics.append(UserFunction(name))
        elif name in METRICS:
            metrics.append(METRICS[name]())
        else:
            hint = did_you_mean(name, [*METRICS, UserFunction.name])
            raise UnknownKeyError(f"{source}: there is no metric {name!r}", hint)
    return metrics


def generates_text(recipe: Recipe) -> bool:
    """True if a metric of the recipe needs generated text, or might need it because the task is not resolved."""
    if _has_unknown_metrics(recipe):
        return True
    return any(metric.needs == "generated" for metric in select_metrics(recipe))


def select_headline_metric(recipe: Recipe, scores: Sequence[str]) -> str | None:
    """Return the name of the headline metric among ``scores``; None if none was computed.

    Without ``evaluate.headline_metric`` it is the task's own, or the first score if the task's own is not computed.
    """
    requested = recipe.evaluate.headline_metric
    if requested is not None:
        return requested if requested in scores else None
    own = recipe.task.headline_metric
    return own if own in scores else next(iter(scores), None)


def check_metrics(recipe: Recipe) -> None:
    """Check metrics and headline metric of a recipe; called before anything is loaded.

    Raises:
        UnknownKeyError: there is no such metric.
        OutOfRangeError: the task lacks what a metric needs, these metrics do not compute the headline metric, or
            nothing scores teacher-forced text.
        MetricError: a metric's library is missing, or its code cannot be imported.
    """
    metrics = select_metrics(recipe)
    for metric in metrics:
        metric.check()
    if _has_unknown_metrics(recipe):
        return  # a run checks them once it has resolved the task
    for metric in metrics:
        _check_task(metric, recipe)
    headline = recipe.evaluate.headline_metric
    if headline is not None and not any(metric.may_have_score(headline) for metric in metrics):
        names = [name for metric in metrics for name in metric.scores]
        hint = did_you_mean(headline, names) if names else "set evaluate.metrics, or evaluate.headline_metric=null"
        raise OutOfRangeError(f"evaluate.headline_metric={headline} is not a score of the recipe's metrics", hint)
    if recipe.evaluate.teacher_forced and not any(metric.needs == "generated" for metric in metrics):
        raise OutOfRangeError(
            "evaluate.teacher_forced=true needs a metric that scores text",
            "add one to evaluate.metrics, or set evaluate.teacher_forced=false",
        )


def _has_unknown_metrics(recipe: Recipe) -> bool:
    return recipe.evaluate.metrics is None and not recipe.task.is_resolved


def _check_task(metric: Metric, recipe: Recipe) -> None:
    """Check that the task gives what a metric needs.

    Raises:
        OutOfRangeError: it does not.
    """
    given = {"generate": {"generated", "losses"}, "choices": {"choices", "losses"}, "loss": {"losses"}}
    if not recipe.task.is_resolved or metric.needs in given[recipe.task.evaluation]:
        return
    usable = [name for name, kind in METRICS.items() if kind.needs in given[recipe.task.evaluation]]
    raise OutOfRangeError(
        f"evaluate.metrics has {metric.name}, which needs {NEED_NAMES[metric.needs]}, and task.kind={recipe.task.kind} "
        "has none",
        f"use some of {', '.join(usable)}",
    )
