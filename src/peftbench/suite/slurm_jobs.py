"""From a suite or a recipe to the one job, or the array of jobs, that runs what is not finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.recipe.loader import to_inline_yaml, load_recipe, read_yaml
from peftbench.errors import SlurmError
from peftbench.run_dir.results import load_existing_result
from peftbench.run_dir.lock import is_locked
from peftbench.recipe.schema import Recipe
from peftbench.slurm.options import check_time_limit, parse_sbatch_options
from peftbench.slurm.queue import list_queued_jobs
from peftbench.slurm.batch_script import Job
from peftbench.slurm.submit import LOG_DIR, LaunchFile, Submission, find_launch_file
from peftbench.slurm.job_file import read_job_file
from peftbench.suite.expand import resolve_accelerate_config, expand, with_seeds, read_suite


def is_suite(path: Path) -> bool:
    """Whether a file is a suite and no recipe.

    Raises:
        RecipeError: it cannot be read.
    """
    return any("recipes" in part for part in read_yaml(path))


@dataclass(frozen=True)
class SubmissionPlan:
    """What a suite or a recipe asks of SLURM."""

    recipes: tuple[Recipe, ...]
    """Of runs that have no result and are in no queue."""
    job: Job
    engine: LaunchFile | None
    place: Path
    """Folder for the script."""
    finished: int
    """Runs that have their result."""
    waiting: tuple[str, ...]
    """Who has the runs that are in the queue, or under way, already."""


def plan_submission(
    target: Path,
    overrides: Sequence[str],
    options: Sequence[str],
    *,
    out: Path | None,
    engine: str | None,
    nodes: int,
    gpus_per_node: int | None,
    at_once: int | None,
    restarts: int,
    seeds: int | None = None,
) -> SubmissionPlan:
    """The runs of ``target`` that are left to do, their job, their engine, and the folder for the script.

    ``options`` are for sbatch, as ``time=1:00:00``; a suite's own ``slurm`` comes before them. With ``seeds``, what
    trains runs with so many of them.

    Raises:
        RecipeError, SlurmError: what was given cannot be meant; nothing was written.
    """
    recipes, name, given, named = _load_target(target, overrides, out, seeds)
    chosen = parse_sbatch_options(given | dict(map(_parse_option, options)))
    check_time_limit(chosen)
    launcher = find_launch_file(engine or str(named)) if engine or named else None
    if launcher is None and nodes > 1:
        raise SlurmError("--nodes wants an engine that spreads a training over machines; give --engine, as zero2")
    unfinished = [recipe for recipe in recipes if load_existing_result(recipe) is None]
    lasting = {key for key, found in list_queued_jobs().items() if found.lasts}
    waiting = {_get_run_dir(recipe): key for recipe in unfinished if (key := _find_active_owner(_get_run_dir(recipe), lasting))}
    left = tuple(recipe for recipe in unfinished if _get_run_dir(recipe) not in waiting)
    root = Path(recipes[0].output_dir).resolve()
    place_of_script = root if len(recipes) > 1 else root / recipes[0].name
    on_cpu = launcher is not None and bool(launcher.config.get("use_cpu"))
    per_node = 1 if launcher is None else launcher.processes
    gpus = (0 if on_cpu else per_node) if gpus_per_node is None else gpus_per_node
    job = Job(
        name=name, folders=tuple(map(_get_run_dir, left)), logs=place_of_script / LOG_DIR, options=chosen, nodes=nodes,
        gpus_per_node=gpus,
        processes_per_node=gpus or per_node, launched=launcher is not None,
        deepspeed=launcher is not None and launcher.deepspeed is not None, at_once=at_once, restarts=restarts,
    )  # fmt: skip
    return SubmissionPlan(left, job, launcher, place_of_script, len(recipes) - len(unfinished), tuple(waiting.values()))


def _load_target(
    target: Path, overrides: Sequence[str], out: Path | None, seeds: int | None
) -> tuple[list[Recipe], str, dict[str, Any], Path | None]:
    """Recipes, name, options for sbatch and accelerate file."""
    if is_suite(target):
        suite = read_suite(target)
        recipes = expand(target, overrides, out, seeds)
        return recipes, suite.name, _check_quoted_times(suite.slurm), resolve_accelerate_config(target)
    place = [f"output_dir={to_inline_yaml(str(out))}"] if out is not None else []
    recipe = load_recipe([target], [*overrides, *place])
    return with_seeds(recipe, seeds), recipe.name, {}, None


def _find_active_owner(folder: Path, queue: Set[str]) -> str | None:
    """Whose it is already: a job's, or a process's that was started by hand."""
    if (before := read_job_file(folder)) is not None and before.job in queue:
        return f"job {before.job}"
    return f"a process, in {folder}" if is_locked(folder) else None


def _get_run_dir(recipe: Recipe) -> Path:
    return Path(recipe.output_dir).resolve() / recipe.name


def _parse_option(word: str) -> tuple[str, str | bool | None]:
    """A name and its value, which is text as sbatch would be given it: YAML takes 1:00:00 for 3,600."""
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise SlurmError(f"slurm.{word} is no option; write slurm.OPTION=VALUE, as slurm.time=4:00:00")
    words: dict[str, bool | None] = {"true": True, "false": False, "null": None}
    return name, words.get(value, value)


def _check_quoted_times(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("time", "time-min", "time_min", "begin", "deadline"):
        if isinstance(options.get(name), (int, float)):
            raise SlurmError(f"the suite's slurm.{name} must be in quotes, for YAML takes 1:00:00 for 3,600")
    return dict(options)


def describe_skipped_runs(asked: SubmissionPlan) -> list[str]:
    """What is not submitted, and why."""
    said = []
    if asked.finished:
        said.append(f"{asked.finished} {'have' if asked.finished > 1 else 'has'} a result already, left out")
    if asked.waiting:
        said.append(f"{len(asked.waiting)} under way already, left out: {', '.join(asked.waiting)}")
    return said


def describe_next_steps(submission: Submission) -> str:
    """What a person does next."""
    folders = submission.folders
    place = submission.script.parent
    return (
        f"submitted job {submission.job}: {len(folders)} run{'s' if len(folders) > 1 else ''}, by {submission.script}\n"
        f"follow:  peftbench status {place}\n"
        f"logs:    {submission.logs}\n"
        f"cancel:  scancel {submission.job}\n"
        f"results: peftbench report {place}"
    )
