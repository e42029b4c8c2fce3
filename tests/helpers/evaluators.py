"""Lengths and types of the fixtures that build evaluators."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.metrics.selection import generates_text, select_metrics
from peftbench.evaluation.outputs import build_outputs
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
    config, dataset = evaluator.config, evaluator.dataset
    held_out = evaluator.compute_held_out_loss()
    forced = evaluator.decode_teacher_forced() if config.teacher_forced else None
    generated = evaluator.generate_summaries() if generates_text(recipe) else None
    quality = build_quality(config, dataset, generated, held_out=held_out)
    if not select_metrics(recipe):
        return quality
    return add_scores(recipe, quality, build_outputs(dataset, generated, forced))
