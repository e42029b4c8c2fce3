"""Build the evaluator of a split for a run's engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from peftbench.evaluation.evaluator import Evaluator, add_scores, build_quality
from peftbench.evaluation.outputs import build_outputs

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.encode import Encoder
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


def compute_metric_means(evaluator: Evaluator) -> dict[str, float]:
    """Generate texts with the evaluator's model and return the mean of each metric. Collective."""
    config, examples = evaluator.config, evaluator.dataset
    generated = evaluator.generate_summaries()
    quality = add_scores(config, build_quality(config, examples, generated), build_outputs(examples, generated, None))
    return {name: score.mean for name, score in (quality.rouge or {}).items()}
