"""From a suite or a recipe to the one job, or the array of jobs, that runs what is not finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.errors import SlurmError
from peftbench.recipe.loader import load_recipe, read_yaml, to_inline_yaml
from peftbench.recipe.schema import Recipe
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import is_locked
from peftbench.run_dir.results import load_existing_result
from peftbench.slurm.batch_script import Job
from peftbench.slurm.job_file import read_job_file
from peftbench.slurm.options import check_time_limit, parse_sbatch_options
from peftbench.slurm.queue import list_queued_jobs
from peftbench.slurm.submit import LOG_DIR, LaunchFile, Submission, find_launch_file
from peftbench.suite.expand import expand, read_suite, resolve_accelerate_config, with_seeds


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
    launch_file: LaunchFile | None
    script_dir: Path
    """Folder for the script."""
    num_finished: int
    """Runs that have their result."""
    active_owners: tuple[str, ...]
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
    max_parallel: int | None,
    max_requeues: int,
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
    lasting = {key for key, found in list_queued_jobs().items() if found.is_active}
    waiting = {
        _get_run_dir(recipe): key for recipe in unfinished if (key := _find_active_owner(_get_run_dir(recipe), lasting))
    }
    left = tuple(recipe for recipe in unfinished if _get_run_dir(recipe) not in waiting)
    root = Path(recipes[0].output_dir).resolve()
    place_of_script = root if len(recipes) > 1 else root / recipes[0].name
    on_cpu = launcher is not None and bool(launcher.config.get("use_cpu"))
    per_node = 1 if launcher is None else launcher.processes_per_node
    gpus = (0 if on_cpu else per_node) if gpus_per_node is None else gpus_per_node
    job = Job(
        name=name,
        run_dirs=tuple(map(_get_run_dir, left)),
        log_dir=place_of_script / LOG_DIR,
        options=chosen,
        nodes=nodes,
        gpus_per_node=gpus,
        processes_per_node=gpus or per_node,
        uses_accelerate=launcher is not None,
        uses_deepspeed=launcher is not None and launcher.deepspeed_config_path is not None,
        max_parallel=max_parallel,
        max_requeues=max_requeues,
    )
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


def _find_active_owner(run_dir: Path, active_jobs: Set[str]) -> str | None:
    """Whose it is already: a job's, or a process's that was started by hand."""
    if (before := read_job_file(run_dir)) is not None and before.job_id in active_jobs:
        return f"job {before.job_id}"
    return f"a process, in {run_dir}" if is_locked(run_dir) else None


def _get_run_dir(recipe: Recipe) -> Path:
    return RunDir.from_recipe(recipe).path.resolve()


def _parse_option(argument: str) -> tuple[str, str | bool | None]:
    """A name and its value, which is text as sbatch would be given it: YAML takes 1:00:00 for 3,600."""
    name, equals, value = argument.partition("=")
    if not equals or not name:
        raise SlurmError(f"slurm.{argument} is no option; write slurm.OPTION=VALUE, as slurm.time=4:00:00")
    words: dict[str, bool | None] = {"true": True, "false": False, "null": None}
    return name, words.get(value, value)


def _check_quoted_times(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("time", "time-min", "time_min", "begin", "deadline"):
        if isinstance(options.get(name), (int, float)):
            raise SlurmError(f"the suite's slurm.{name} must be in quotes, for YAML takes 1:00:00 for 3,600")
    return dict(options)


def describe_skipped_runs(plan: SubmissionPlan) -> list[str]:
    """What is not submitted, and why."""
    said = []
    if plan.num_finished:
        said.append(f"{plan.num_finished} {'have' if plan.num_finished > 1 else 'has'} a result already, left out")
    if plan.active_owners:
        said.append(f"{len(plan.active_owners)} under way already, left out: {', '.join(plan.active_owners)}")
    return said


def describe_next_steps(submission: Submission) -> str:
    """What a person does next."""
    folders = submission.run_dirs
    place = submission.script_path.parent
    return (
        f"submitted job {submission.job_id}: {len(folders)} run{'s' if len(folders) > 1 else ''}, by {submission.script_path}\n"
        f"follow:  peftbench status {place}\n"
        f"logs:    {submission.log_dir}\n"
        f"cancel:  scancel {submission.job_id}\n"
        f"results: peftbench report {place}"
    )
