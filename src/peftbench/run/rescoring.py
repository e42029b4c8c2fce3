"""Compute the metrics of a run again from its saved outputs, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftbench.common.fingerprint import exclude_keys, fingerprint_recipe
from peftbench.errors import OutOfRangeError, RecordError
from peftbench.evaluation.evaluator import add_scores
from peftbench.evaluation.outputs import read_outputs
from peftbench.recipe.schema import Recipe
from peftbench.record import Outcome, read_record
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import Lock


def rescore_outputs(recipe: Recipe) -> tuple[Outcome, Path]:
    """Compute the metrics of the run in the recipe's folder from its outputs; return its outcome and record file.

    A run that has outputs was evaluated to the end, so its outcome becomes ``ok``.

    Raises:
        RecordError: the run has no record, no outputs, or outputs of other examples.
        RunLockedError: another process works in the folder.
    """
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
                "with --from-outputs, override only evaluate.bootstrap_resamples",
            )
        values = {
            "quality": add_scores(recipe.evaluate, record.quality, outputs),
            "recipe": recipe.model_dump(mode="json"),
            "recipe_fingerprint": recipe.fingerprint(),
            "outcome": Outcome(kind="ok"),
        }
        record = record.model_copy(update=values)
        return record.outcome, record.write(run_dir.path)
    finally:
        lock.release()


def _fingerprint(values: Mapping[str, Any]) -> str:
    """Return the hash of a recipe without what only changes the metrics' intervals."""
    return fingerprint_recipe(values, exclude_keys("evaluate.bootstrap_resamples"))
