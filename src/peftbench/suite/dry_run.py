"""Plan what ``peftbench run`` would do: which runs start, resume or are skipped, with their disk space and hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate
from tqdm.auto import tqdm

from peftbench.common.fingerprint import drop_neutral_keys
from peftbench.common.nested_keys import list_differences
from peftbench.common.units import format_bytes
from peftbench.errors import HubUnreachableError, RecordError
from peftbench.recipe.differences import format_value
from peftbench.record import FINAL_OUTCOMES, RunRecord, read_record
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import is_locked
from peftbench.run_dir.saved_model import has_model_of
from peftbench.suite.results import ResultFinder

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe

_MAX_LISTED_KEYS = 3


@dataclass(frozen=True)
class PlannedRun:
    """The planned action for one run of a suite: run, resume or skip."""

    name: str
    action: str
    """run, resume or skip."""
    reason: str
    disk_bytes: int | None
    """Bytes that its saved model and checkpoints will take at most; None if unknown."""
    hours: float | None
    """Hours of the last finished run of the same recipe; None if there was none."""


def plan_runs(recipes: Sequence[Recipe], accelerate: Path | None) -> list[PlannedRun]:
    """Return what would happen to each recipe; nothing is written."""
    finder, unreachable = ResultFinder(accelerate), set[str]()
    progress = tqdm(recipes, desc="planning", unit="run", disable=None)
    return [_plan_run(recipe, finder, unreachable) for recipe in progress]


def format_planned_runs(runs: Sequence[PlannedRun]) -> str:
    """Return a table of the runs and a line with the sums."""
    rows = [
        (
            run.name,
            run.action,
            run.reason,
            "unknown" if run.disk_bytes is None else format_bytes(run.disk_bytes),
            "unknown" if run.hours is None else f"{run.hours:.2f}",
        )
        for run in runs
    ]
    table = tabulate(rows, headers=["run", "action", "reason", "disk", "hours"], disable_numparse=True)
    started = [run for run in runs if run.action != "skip"]
    disk = format_bytes(sum(run.disk_bytes or 0 for run in started))
    known = [run.hours for run in started if run.hours is not None]
    hours = f"{sum(known):.2f} hours for the {len(known)} whose duration is known" if known else "unknown hours"
    if not started:
        return f"{table}\n\nnothing to run"
    unknown = sum(run.disk_bytes is None for run in started)
    disk += f" (unknown for {unknown} of them)" if unknown else ""
    return f"{table}\n\nto run: {len(started)} of {len(runs)}, with up to {disk} of disk space and {hours}"


def _plan_run(recipe: Recipe, finder: ResultFinder, unreachable: set[str]) -> PlannedRun:
    """Return the plan of one run; ``unreachable`` collects the models for which the Hub did not answer."""
    run_dir = RunDir.from_recipe(recipe)
    record = _read_record_or_none(run_dir.record_file)
    if finder.find_existing_result(recipe) is not None:
        return PlannedRun(recipe.name, "skip", "finished", 0, 0.0)
    if is_locked(run_dir.path):
        return PlannedRun(recipe.name, "skip", "another process has locked its folder", 0, None)
    disk = _estimate_disk_bytes(recipe, unreachable)
    step = run_dir.find_latest_checkpoint_step()
    if step is not None:
        return PlannedRun(recipe.name, "resume", f"checkpoint of step {step}, if its recipe is the same", disk, None)
    if record is None:
        return PlannedRun(recipe.name, "run", "no record", disk, None)
    is_same = finder.find_matching_record(recipe) is not None and record.outcome.kind in FINAL_OUTCOMES
    hours = sum(record.phase_seconds.values()) / 3600 if is_same else None
    return PlannedRun(recipe.name, "run", _explain_rerun(recipe, record, finder), disk, hours)


def _read_record_or_none(path: Path) -> RunRecord | None:
    try:
        return read_record(path)
    except RecordError:
        return None


def _explain_rerun(recipe: Recipe, record: RunRecord, finder: ResultFinder) -> str:
    """Return why a record does not count as a result of ``recipe``."""
    if record.outcome.kind not in FINAL_OUTCOMES:
        return f"its last attempt ended as {record.outcome.kind}"
    resolved = finder.resolve(recipe)
    if resolved is None:
        return "its recipe cannot be resolved"
    old, new = drop_neutral_keys(record.recipe), drop_neutral_keys(resolved.model_dump(mode="json"))
    differences = list_differences(old, new)
    if not differences:
        is_saved = record.outcome.kind == "ok" and recipe.save_model and recipe.method.is_trainable
        has_model = has_model_of(RunDir.from_recipe(recipe).path, record)
        return "its saved model is missing" if is_saved and not has_model else "its data has changed"
    shown = [
        f"{key} was {format_value(before)}, now {format_value(after)}"
        for key, before, after in differences[:_MAX_LISTED_KEYS]
    ]
    more = len(differences) - _MAX_LISTED_KEYS
    return "; ".join([*shown, *([f"and {more} more keys"] if more > 0 else [])])


def _estimate_disk_bytes(recipe: Recipe, unreachable: set[str]) -> int | None:
    """Return the bytes of the saved model and of the checkpoints that exist at once, None if unknown."""
    if not recipe.method.is_trainable:
        return 0
    if recipe.model.path in unreachable:  # asking again for each run would take minutes
        return None
    from peftbench.common.libraries import quiet_libraries

    quiet_libraries()
    from peftbench.memory.lower_bound import measure_tensors
    from peftbench.memory.search import with_micro_batch
    from peftbench.training.auto_settings import resolve_for_launch

    try:
        tensors = measure_tensors(with_micro_batch(resolve_for_launch(recipe)[0], 1))
    except HubUnreachableError:
        unreachable.add(recipe.model.path)
        return None
    except Exception:  # whatever is wrong with the model, the run itself reports it
        return None
    saved = tensors.trained_bytes if recipe.method.keeps_base_frozen else tensors.weight_bytes
    model = saved if recipe.save_model else 0
    checkpoint = tensors.trained_bytes + tensors.state_bytes
    # A new checkpoint is complete before the oldest one is deleted.
    copies = recipe.checkpoint.keep_latest + 1 if recipe.checkpoint.interval is not None else 0
    return model + copies * checkpoint
