"""Scores of a model: from held-out losses and outputs to the quality in the record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftbench.errors import MetricError, RecordError
from peftbench.evaluation.intervals import bootstrap_interval
from peftbench.evaluation.metrics.base import LossMetric
from peftbench.evaluation.metrics.selection import select_headline_metric, select_metrics
from peftbench.record import Interval, PerExample, Quality, Sample, Score, ScoreDefinition
from peftbench.record.quality import MAX_SAMPLE_CHARS

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.evaluation.evaluator import HeldOutLoss
    from peftbench.evaluation.metrics.base import Metric
    from peftbench.evaluation.outputs import Output
    from peftbench.recipe.schema import Recipe

ValuesByScore = dict[str, tuple[float, ...]]
"""One value per example, by score name."""


def build_quality(
    recipe: Recipe, dataset: Dataset, outputs: Sequence[Output], *, held_out: HeldOutLoss | None = None
) -> Quality:
    """Return the held-out loss, and the samples to save of the outputs (in the order of ``dataset``, or none)."""
    config, task = recipe.evaluate, recipe.task
    rows = dataset.select_columns(["id", *task.columns])
    references = [task.get_reference(row) for row in rows]
    saved = zip(rows.select(range(min(config.saved_samples, len(rows)))), outputs, strict=False)
    loss = None if held_out is None else held_out.loss
    return Quality(
        split=config.split,
        num_examples=len(dataset),
        loss=loss,
        perplexity=math.exp(loss) if loss is not None and loss < 700 else None,
        samples=tuple(
            Sample(
                id=output.id,
                prompt=task.get_prompt(row)[:MAX_SAMPLE_CHARS],
                reference=output.reference,
                generated=output.prediction,
            )
            for row, output in saved
            if output.prediction is not None
        ),
        per_example=PerExample(
            examples_fingerprint=fingerprint_examples(dataset["id"], references),
            loss=held_out.nll_sums if held_out else (),
            labeled_tokens=held_out.label_counts if held_out else (),
        ),
    )


def add_scores(recipe: Recipe, quality: Quality, outputs: Sequence[Output]) -> Quality:
    """Return ``quality`` with the scores of the recipe's metrics; earlier scores are dropped.

    A method without a model has no losses, so that metrics of losses are left out.

    Raises:
        RecordError: the outputs are not those of the evaluated examples, or lack what a metric needs.
        MetricError: a user's metric fails.
    """
    metrics = [one for one in select_metrics(recipe) if recipe.method.needs_model or one.needs != "losses"]
    per_example = quality.per_example.model_copy(update={"metrics": {}}) if quality.per_example else None
    cleared: dict[str, Any] = {
        "metrics": {},
        "teacher_forced_metrics": {},
        "headline_metric": None,
        "per_example": per_example,
    }
    scored = merge_scores(
        metrics, quality.model_copy(update=cleared), outputs, resamples=recipe.evaluate.bootstrap_resamples
    )
    headline = select_headline_metric(recipe, list(scored.metrics))
    return scored.model_copy(update={"headline_metric": headline})


def merge_scores(metrics: Sequence[Metric], quality: Quality, outputs: Sequence[Output], *, resamples: int) -> Quality:
    """Return ``quality`` with the scores of ``metrics`` added; those of the same name are replaced.

    Raises:
        RecordError, MetricError: as in :func:`add_scores`.
    """
    per_example = quality.per_example
    if per_example is None or per_example.examples_fingerprint != fingerprint_examples(
        [output.id for output in outputs], [output.reference for output in outputs]
    ):
        raise RecordError(
            "the saved outputs do not match the evaluated examples of the record",
            "evaluate the model again, without --from-outputs",
        )
    forced = [output.model_copy(update={"generated": output.teacher_forced}) for output in outputs]
    has_forced = any(output.teacher_forced is not None for output in outputs)
    has_generated = any(output.generated is not None for output in outputs)
    values: ValuesByScore = {}
    scores, forced_scores = dict(quality.metrics), dict(quality.teacher_forced_metrics)
    for metric in metrics:
        if metric.needs != "generated" or has_generated or not has_forced:
            computed = _compute(metric, per_example, outputs)
            values |= computed
            scores |= _build_scores(computed, metric, resamples)
        if metric.needs == "generated" and has_forced:
            forced_scores |= _build_scores(_compute(metric, per_example, forced), metric, resamples)
    return quality.model_copy(
        update={
            "metrics": scores,
            "teacher_forced_metrics": forced_scores,
            "headline_metric": quality.headline_metric or next(iter(scores), None),
            "per_example": per_example.model_copy(update={"metrics": per_example.metrics | values}),
        }
    )


def _compute(metric: Metric, per_example: PerExample, outputs: Sequence[Output]) -> ValuesByScore:
    """Return the values of a metric, one per output."""
    if isinstance(metric, LossMetric):
        if not per_example.loss:
            raise RecordError(
                f"the metric {metric.name} needs held-out losses, which the record lacks", "leave the metric out"
            )
        values = metric.compute_from_losses(per_example.loss, per_example.labeled_tokens)
    else:
        metric.check_outputs(outputs)
        values = metric.compute(outputs)
    for name, one in values.items():
        if len(one) != len(outputs):
            raise MetricError(f"the metric {metric.name} gave {len(one)} values of {name} for {len(outputs)} examples")
    return values


def _build_scores(values: ValuesByScore, metric: Metric, resamples: int) -> dict[str, Score]:
    return {
        name: Score(interval=_compute_interval(one, metric.scores[name], resamples), definition=metric.scores[name])
        for name, one in values.items()
    }


def _compute_interval(values: Sequence[float], definition: ScoreDefinition, resamples: int) -> Interval:
    """Return the mean and its interval, which stays within the score's range."""
    interval = bootstrap_interval(values, resamples)
    low = interval.low if definition.low is None else max(interval.low, definition.low)
    high = interval.high if definition.high is None else min(interval.high, definition.high)
    return Interval(mean=interval.mean, low=low, high=high)


def fingerprint_examples(ids: Sequence[str], references: Sequence[str]) -> str:
    """Return a hash of these examples in this order."""
    return hashlib.blake2b(json.dumps([list(ids), list(references)]).encode(), digest_size=8).hexdigest()
