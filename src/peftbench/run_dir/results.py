"""Find the record of a recipe that already ran, so that it does not run again."""

from __future__ import annotations

from peftbench.errors import PeftbenchError, RecordError
from peftbench.recipe.schema import Recipe
from peftbench.record import FINAL_OUTCOMES, RunRecord, read_record
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.saved_model import has_model_of


def load_matching_record(recipe: Recipe) -> RunRecord | None:
    """Return the record of ``recipe``, None if it is missing, unreadable or of a changed recipe."""
    try:
        record = read_record(RunDir.from_recipe(recipe).record_file)
    except RecordError:
        return None
    if record.recipe_fingerprint != recipe.fingerprint():
        return None
    # Keys outside the fingerprint (e.g. a price) may have changed since: use their current values.
    return record.model_copy(update={"recipe": recipe.model_dump(mode="json")})


def load_existing_result(recipe: Recipe) -> RunRecord | None:
    """Return the record of ``recipe`` if its outcome is final, its data is unchanged and its model exists."""
    record = load_matching_record(recipe)
    if record is None or record.outcome.kind not in FINAL_OUTCOMES:
        return None
    is_saved = record.outcome.kind == "ok" and recipe.save_model and recipe.method.is_trainable
    if is_saved and not has_model_of(RunDir.from_recipe(recipe).path, record):
        return None
    source = recipe.data.source
    try:
        is_current = not source.is_mutable or record.data_fingerprint == source.fingerprint()
    except PeftbenchError:  # the run itself will report it
        return None
    return record if is_current else None
