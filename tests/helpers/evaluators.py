"""Lengths and types of the fixtures that build evaluators."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.metrics.selection import generates_text, select_metrics
from peftbench.evaluation.outputs import Predictions, build_outputs
from peftbench.evaluation.scoring import add_scores, build_quality
from peftbench.methods.base import Method
from peftbench.recipe.schema import Recipe
from peftbench.record import Quality

NEW_TOKENS = 10
MAX_TOKENS = 48

BuildEvaluator = Callable[..., Evaluator]
ApplyMethod = Callable[[Method, str], nn.Module]


def evaluate_all(evaluator: Evaluator, recipe: Recipe) -> Quality:
    """Return the quality that a run of ``recipe`` records."""
    dataset, task = evaluator.dataset, recipe.task
    held_out = evaluator.compute_held_out_loss()
    predictions = Predictions(
        generated=evaluator.generate() if generates_text(recipe) else None,
        teacher_forced=evaluator.decode_teacher_forced() if recipe.evaluate.teacher_forced else None,
    )
    outputs = build_outputs(dataset, task, predictions)
    quality = build_quality(recipe, dataset, outputs, held_out=held_out)
    return add_scores(recipe, quality, outputs) if select_metrics(recipe) else quality
