"""Build the evaluator of a split for a run's engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.metrics.selection import select_metrics
from peftbench.evaluation.outputs import Predictions, build_outputs
from peftbench.evaluation.scoring import add_scores, build_quality

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.encode import Encoder
    from peftbench.evaluation.evaluator import HeldOutLoss
    from peftbench.recipe.schema import Recipe
    from peftbench.run.state import RunState
    from peftbench.training.build import AdaptedModel


def build_evaluator(
    state: RunState,
    adapted_model: AdaptedModel,
    encoder: Encoder,
    examples: Dataset,
    is_oom: Callable[[BaseException], bool],
    *,
    recipe: Recipe | None = None,
) -> Evaluator:
    """Return an evaluator of encoded examples; with sharded weights, all ranks run the model equally often.

    ``recipe`` replaces that of the run if the model has another method applied.
    """
    is_sharded = state.engine.shards_weights and state.recipe.method.is_trainable
    return Evaluator(
        state.context, adapted_model, encoder, examples, recipe or state.recipe, synced=is_sharded, is_oom=is_oom
    )


def compute_metric_means(evaluator: Evaluator, recipe: Recipe, held_out: HeldOutLoss) -> dict[str, float]:
    """Compute the mean of each score of the recipe's metrics with the evaluator's model. Collective."""
    needs = {metric.needs for metric in select_metrics(recipe)}
    predictions = Predictions(
        generated=evaluator.generate() if "generated" in needs else None,
        choices=evaluator.score_choices() if "choices" in needs else None,
    )
    outputs = build_outputs(evaluator.dataset, recipe.task, predictions)
    quality = build_quality(recipe, evaluator.dataset, outputs, held_out=held_out)
    return {name: score.interval.mean for name, score in add_scores(recipe, quality, outputs).metrics.items()}
