"""Compute the metrics of a run again from its saved outputs, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftbench.common.fingerprint import exclude_keys, fingerprint_recipe
from peftbench.errors import OutOfRangeError, RecordError
from peftbench.evaluation.metrics.selection import build_metrics
from peftbench.evaluation.outputs import read_outputs
from peftbench.evaluation.scoring import add_scores, merge_scores
from peftbench.recipe.schema import Recipe
from peftbench.record import Outcome, read_record
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import Lock

_SCORING_KEYS = ("evaluate.metrics", "evaluate.headline_metric", "evaluate.bootstrap_resamples")
"""Keys that change what is computed from the outputs, and not the outputs."""


def rescore_outputs(recipe: Recipe, metrics: Sequence[str] = ()) -> tuple[Outcome, Path]:
    """Compute the metrics of the run in the recipe's folder from its outputs; return its outcome and record file.

    A run that has outputs was evaluated to the end, so its outcome becomes ``ok``. With ``metrics``, only these are
    computed and added to the record, whose other scores and outcome stay.

    Raises:
        UnknownKeyError: there is no such metric.
        RecordError: the run has no record, no outputs, outputs of other examples, or outputs that a metric cannot use.
        MetricError: a metric's library is missing, or a user's metric fails.
        RunLockedError: another process works in the folder.
    """
    added = build_metrics(metrics, "--metric")
    for metric in added:
        metric.check()
    run_dir = RunDir.from_recipe(recipe)
    lock = Lock(run_dir.path)
    lock.acquire()
    try:
        record = read_record(run_dir.record_file)
        outputs = read_outputs(run_dir.path)
        if record.quality is None:
            raise RecordError(f"{run_dir.record_file} has no evaluation", f"use peftbench evaluate {run_dir.path}")
        if _fingerprint(recipe.model_dump(mode="json")) != _fingerprint(record.recipe):
            raise OutOfRangeError(
                "the saved outputs were generated with another recipe",
                f"with --from-outputs, override only {', '.join(_SCORING_KEYS)}",
            )
        if added:
            resamples = recipe.evaluate.bootstrap_resamples
            quality = merge_scores(added, record.quality, outputs, resamples=resamples)
        else:
            quality = add_scores(recipe, record.quality, outputs)
        values = {
            "quality": quality,
            "recipe": recipe.model_dump(mode="json"),
            "recipe_fingerprint": recipe.fingerprint(),
            "outcome": record.outcome if added else Outcome(kind="ok"),
        }
        record = record.model_copy(update=values)
        return record.outcome, record.write(run_dir.path)
    finally:
        lock.release()


def _fingerprint(values: Mapping[str, Any]) -> str:
    """Return the hash of a recipe without the keys that only change what is computed from the outputs."""
    return fingerprint_recipe(values, exclude_keys(*_SCORING_KEYS))
