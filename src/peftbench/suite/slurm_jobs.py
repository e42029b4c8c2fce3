"""Plan a SLURM job, or job arrays, for the unfinished runs of a suite or a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftbench.common.filesystem import path_exists
from peftbench.common.fingerprint import fingerprint_recipe
from peftbench.errors import PeftbenchError, RecordError, SlurmError
from peftbench.evaluation.metrics.selection import check_metrics
from peftbench.recipe.arguments import check_is_recipe, is_suite
from peftbench.recipe.loader import load_recipe, to_inline_yaml
from peftbench.recipe.schema import Recipe
from peftbench.record import FINAL_OUTCOMES, read_record
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import is_locked
from peftbench.run_dir.results import load_existing_result
from peftbench.slurm.batch_script import Job
from peftbench.slurm.gpus import GPUS_PER_NODE, find_gpu_options, take_gpu_request
from peftbench.slurm.job_file import read_job_file
from peftbench.slurm.options import PROLOGUE_KEY, check_time_limit, parse_prologue, parse_sbatch_options
from peftbench.slurm.queue import list_queued_jobs, read_max_array_size
from peftbench.slurm.submit import LOG_DIR, LaunchFile, Submission, find_launch_file
from peftbench.suite.expand import check_equal_steps, expand, read_suite, resolve_accelerate_config, with_seeds


@dataclass(frozen=True)
class SubmissionPlan:
    """The runs to submit, their jobs and engine."""

    recipes: tuple[Recipe, ...]
    """Recipes of the runs without a result that are not in the queue."""
    jobs: tuple[Job, ...]
    """One job; several for more runs than an array of the cluster may have."""
    launch_file: LaunchFile | None
    script_dir: Path
    """Folder of the job script."""
    num_finished: int
    """Number of runs that have a result."""
    num_undecided: int
    """Number of runs to submit that have a result, which counts only if the job resolves the recipe equally."""
    active_owners: tuple[str, ...]
    """The jobs and processes that already run, or wait to run, some of the runs."""


def plan_submission(
    target: Path,
    overrides: Sequence[str],
    options: Sequence[str],
    *,
    config: Sequence[Path] = (),
    out: Path | None,
    accelerate: str | None,
    nodes: int,
    gpus_per_node: str | None,
    max_parallel: int | None,
    max_requeues: int,
    seeds: int | None = None,
) -> SubmissionPlan:
    """Return the unfinished runs of ``target`` with their jobs, engine and script folder.

    The files of ``config`` are merged into every recipe. ``options`` are sbatch options such as ``time=1:00:00``; they
    override the ``slurm`` key of a suite. ``gpus_per_node`` is ``[TYPE:]NUMBER``, None to derive it. ``seeds`` is the
    number of seeds per run that trains.

    Raises:
        RecipeError, SlurmError: invalid input; nothing was written.
    """
    recipes, name, suite_options, suite_config = _load_target(target, overrides, config, out, seeds)
    sbatch_options, prologue = _merge_options(suite_options, options, gpus_per_node)
    check_time_limit(sbatch_options)
    launch_file = find_launch_file(accelerate or str(suite_config)) if accelerate or suite_config else None
    if launch_file is None and nodes > 1:
        raise SlurmError("--nodes needs several processes; give --accelerate, e.g. zero2")
    unfinished = [recipe for recipe in recipes if load_existing_result(_resolve_known_keys(recipe)) is None]
    active_jobs = {job_id for job_id, queued in list_queued_jobs().items() if queued.is_active}
    active_owners = {
        _get_run_dir(recipe): owner
        for recipe in unfinished
        if (owner := _find_active_owner(_get_run_dir(recipe), active_jobs))
    }
    to_submit = tuple(recipe for recipe in unfinished if _get_run_dir(recipe) not in active_owners)
    root = Path(recipes[0].output_dir).resolve()
    script_dir = root if len(recipes) > 1 else root / recipes[0].name
    job = Job(
        name=name,
        run_dirs=tuple(map(_get_run_dir, to_submit)),
        log_dir=script_dir / LOG_DIR,
        nodes=nodes,
        prologue=prologue,
        max_parallel=max_parallel,
        max_requeues=max_requeues,
    )
    job = _with_processes(job, sbatch_options, launch_file)
    num_finished = len(recipes) - len(unfinished)
    undecided = [recipe for recipe in to_submit if recipe.needs_resolution and _has_result(recipe)]
    return SubmissionPlan(
        to_submit, _split_job(job), launch_file, script_dir, num_finished, len(undecided), tuple(active_owners.values())
    )


def _with_processes(job: Job, options: Mapping[str, str | None], launch_file: LaunchFile | None) -> Job:
    """Return the job with its options, its engine, and as many processes per node as GPUs."""
    on_cpu = launch_file is not None and bool(launch_file.config.get("use_cpu"))
    per_node = 1 if launch_file is None else launch_file.processes_per_node
    others, gpu_option, gpus = take_gpu_request(options, job.nodes, default=0 if on_cpu else per_node)
    return replace(
        job,
        options=others,
        gpus_per_node=gpu_option,
        processes_per_node=gpus or per_node,
        uses_accelerate=launch_file is not None,
        uses_deepspeed=launch_file is not None and launch_file.deepspeed_config_path is not None,
    )


def _merge_options(
    suite_options: Mapping[str, Any], arguments: Sequence[str], gpus_per_node: str | None
) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """Return the sbatch options and the prologue: those of a suite, overridden by the command line.

    A request for GPUs on the command line replaces the suite's, whichever option it uses.
    """
    given: dict[str, Any] = {}
    commands: list[str] = []
    for name, value in map(_parse_option, arguments):
        if name == PROLOGUE_KEY and value is not None:  # each one is a command
            commands.append(str(value))
        given[name] = commands if name == PROLOGUE_KEY and commands else value
    own = parse_sbatch_options({name: value for name, value in given.items() if name != PROLOGUE_KEY})
    if gpus_per_node is not None:
        if names := find_gpu_options(own):
            raise SlurmError(f"--gpus-per-node and slurm.{names[0]} both request GPUs; give one of them")
        own[GPUS_PER_NODE] = given[GPUS_PER_NODE] = gpus_per_node
    inherited = {_format_name(name): value for name, value in suite_options.items()}
    prologue = parse_prologue(given.get(PROLOGUE_KEY, inherited.pop(PROLOGUE_KEY, None)))
    if find_gpu_options(own):
        replaced = find_gpu_options(parse_sbatch_options(inherited))
        inherited = {name: value for name, value in inherited.items() if name not in replaced}
    kept = {name: value for name, value in inherited.items() if name not in given}
    return parse_sbatch_options(kept) | own, prologue


def _split_job(job: Job) -> tuple[Job, ...]:
    """Return the job, or several with at most as many tasks as an array of the cluster may have.

    Raises:
        SlurmError: ``--max-parallel`` allows fewer tasks than there are jobs.
    """
    size = read_max_array_size()
    parts = [job.run_dirs[start : start + size] for start in range(0, len(job.run_dirs), size)]
    if len(parts) < 2:
        return (job,)
    if job.max_parallel is None:
        return tuple(replace(job, run_dirs=part) for part in parts)
    if job.max_parallel < len(parts):
        raise SlurmError(
            f"{len(job.run_dirs)} runs need {len(parts)} job arrays (MaxArraySize is {size}), and each runs at least "
            f"one task at a time; give --max-parallel {len(parts)} or more"
        )
    shares = [(job.max_parallel + number) // len(parts) for number in range(len(parts))]
    return tuple(replace(job, run_dirs=part, max_parallel=share) for part, share in zip(parts, shares, strict=True))


def _resolve_known_keys(recipe: Recipe) -> Recipe:
    """Return the recipe with what does not depend on the job's device resolved: the task, and the type of weights."""
    if not path_exists(RunDir.from_recipe(recipe).record_file):
        return recipe  # nothing is compared with it
    from peftbench.training.auto_settings import resolve_task

    with suppress(PeftbenchError):  # whatever is wrong with the data, the run reports it
        recipe, _ = resolve_task(recipe)
    return recipe if recipe.train.precision == "auto" else recipe.with_resolved_dtype()


def _has_result(recipe: Recipe) -> bool:
    """True if there is a finished record of the recipe with some values of the keys that the job resolves."""
    try:
        record = read_record(RunDir.from_recipe(recipe).record_file)
    except RecordError:
        return False
    values = recipe.model_dump(mode="json")
    for section, key in (("train", "precision"), ("model", "attention"), ("model", "dtype")):
        if values[section][key] == "auto":
            values[section][key] = record.recipe.get(section, {}).get(key)
    if recipe.model.quantization is None:  # weights that are stored quantized set it
        values["model"]["quantization"] = record.recipe.get("model", {}).get("quantization")
    if not recipe.task.is_resolved:
        values["task"] = record.recipe.get("task")
    known = recipe if recipe.train.precision == "auto" else recipe.with_resolved_dtype()
    if values == known.model_dump(mode="json"):  # nothing depends on the job: the data has changed
        return False
    return record.outcome.kind in FINAL_OUTCOMES and fingerprint_recipe(values) == record.recipe_fingerprint


def _load_target(
    target: Path, overrides: Sequence[str], config: Sequence[Path], out: Path | None, seeds: int | None
) -> tuple[list[Recipe], str, dict[str, Any], Path | None]:
    """Return the recipes, the name, the sbatch options and the accelerate config of a suite or a recipe."""
    for file in config:
        check_is_recipe(file, "submit --config")
    if is_suite(target):
        suite = read_suite(target)
        recipes = expand(target, overrides, out, seeds, config)
        return recipes, suite.name, dict(suite.slurm), resolve_accelerate_config(target)
    output = [f"output_dir={to_inline_yaml(str(out))}"] if out is not None else []
    recipe = load_recipe([target, *config], [*overrides, *output])
    check_metrics(recipe)
    recipes = with_seeds(recipe, seeds)
    check_equal_steps(recipes)
    return recipes, recipe.name, {}, None


def _find_active_owner(run_dir: Path, active_jobs: Set[str]) -> str | None:
    """Return the active job of a run, or the process that runs it outside SLURM; None if neither exists."""
    if (job_file := read_job_file(run_dir)) is not None and job_file.job_id in active_jobs:
        return f"job {job_file.job_id}"
    return f"a process in {run_dir}" if is_locked(run_dir) else None


def _get_run_dir(recipe: Recipe) -> Path:
    return RunDir.from_recipe(recipe).path.resolve()


def _parse_option(argument: str) -> tuple[str, str | bool | None]:
    """Return the name and the value as text. It is not parsed as YAML, which would read 1:00:00 as 3600."""
    name, equals, value = argument.partition("=")
    if not equals or not name:
        raise SlurmError(f"slurm.{argument} is not an option; write slurm.OPTION=VALUE, e.g. slurm.time=4:00:00")
    constants: dict[str, bool | None] = {"true": True, "false": False, "null": None}
    return _format_name(name), constants.get(value, value)


def _format_name(name: str) -> str:
    return name.replace("_", "-")


def describe_skipped_runs(plan: SubmissionPlan) -> list[str]:
    """Return one line per reason why runs are not submitted, or are submitted again."""
    lines = []
    if plan.num_finished:
        lines.append(f"skipped {_format_num_runs(plan.num_finished)} with a result")
    if plan.num_undecided:
        runs = _format_num_runs(plan.num_undecided)
        verb = "is" if plan.num_undecided == 1 else "are"
        lines.append(
            f"{runs} with a result {verb} submitted again, since auto and a stored quantization are resolved by the "
            "job, which skips a run whose record has the same values"
        )
    if plan.active_owners:
        num_active = _format_num_runs(len(plan.active_owners))
        lines.append(f"skipped {num_active} already queued or running: {', '.join(plan.active_owners)}")
    return lines


def _format_num_runs(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"


def describe_next_steps(submissions: Sequence[Submission]) -> str:
    """Return the commands that follow, cancel and report the submitted jobs."""
    folder = submissions[0].script_path.parent
    lines = [
        f"submitted job {one.job_id}: {_format_num_runs(len(one.run_dirs))}, script {one.script_path}"
        for one in submissions
    ]
    return "\n".join(
        [
            *lines,
            f"follow:  peftbench status {folder}",
            f"logs:    {submissions[0].log_dir}",
            f"cancel:  scancel {' '.join(str(one.job_id) for one in submissions)}",
            f"results: peftbench report {folder}",
        ]
    )
