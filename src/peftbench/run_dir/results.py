"""Whether a recipe has its result already, so that no work is done twice."""

from __future__ import annotations

from pathlib import Path

from peftbench.errors import PeftbenchError, RecordError
from peftbench.recipe.schema import Recipe
from peftbench.record import FINAL_OUTCOMES, RECORD_FILE, RunRecord, read_record


def load_matching_record(recipe: Recipe) -> RunRecord | None:
    """The record of this very recipe; one of a recipe that was changed since, or that cannot be read, is none."""
    try:
        record = read_record(Path(recipe.output_dir) / recipe.name / RECORD_FILE)
    except RecordError:
        return None
    if record.recipe_fingerprint != recipe.fingerprint():
        return None
    # What no number depends on (a price, say) may have changed since, and is shown as it is now.
    return record.model_copy(update={"recipe": recipe.model_dump(mode="json")})


def load_existing_result(recipe: Recipe) -> RunRecord | None:
    """The record of this very recipe where it is a result, on the examples that lie there now."""
    record = load_matching_record(recipe)
    if record is None or record.outcome.kind not in FINAL_OUTCOMES:
        return None
    source = recipe.data.source
    try:
        same = not source.is_mutable or record.data_fingerprint == source.fingerprint()
    except PeftbenchError:  # the run will say why
        return None
    return record if same else None
