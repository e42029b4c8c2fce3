"""The commands ``submit`` and ``status``: runs as SLURM jobs, and the state of all runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.cli.options import AccelerateOption, JsonOption, OutOption, SeedsOption, print_to_stderr
from peftbench.common.console import cli_errors
from peftbench.common.options import ConfigOption

_SBATCH_PREFIX = "slurm."
_OverridesArgument = Annotated[
    Optional[list[str]],
    typer.Argument(
        metavar="KEY.SUB=VALUE",
        help="Recipe keys to override, sbatch options as slurm.OPTION=VALUE, and commands before the run as "
        "slurm.prologue=COMMAND.",
    ),
]

_DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Write the batch script and the recipes and print the script, but do not submit it.",
    ),
]


def submit(
    target: Annotated[Path, typer.Argument(metavar="SUITE_OR_RECIPE", help="Suite or recipe file.")],
    overrides: _OverridesArgument = None,
    config: ConfigOption = None,
    accelerate: AccelerateOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes per run.")] = 1,
    gpus_per_node: Annotated[
        Optional[str],
        typer.Option(
            metavar="[TYPE:]NUMBER",
            help="GPUs per node, e.g. 4 or a100:4; 0 for CPU. Default: the accelerate config's processes per node, "
            "or 1.",
        ),
    ] = None,
    max_parallel: Annotated[
        Optional[int],
        typer.Option(min=1, help="Maximum number of array tasks that run at the same time. Default: all."),
    ] = None,
    max_requeues: Annotated[
        int, typer.Option(min=0, help="Maximum number of times that a job requeues itself at its time limit.")
    ] = 10,
    seeds: SeedsOption = None,
    out: OutOption = None,
    dry_run: _DryRunOption = False,
) -> None:
    """Submit a suite to SLURM as a job array, or a recipe as one job."""
    from peftbench.recipe.arguments import refuse_second_file
    from peftbench.slurm.submit import prepare_submissions, submit_jobs
    from peftbench.suite.slurm_jobs import describe_next_steps, describe_skipped_runs, plan_submission

    with cli_errors():
        recipe_overrides, sbatch_options = _split_arguments(overrides or [])
        refuse_second_file("submit", recipe_overrides)
        plan = plan_submission(
            target,
            recipe_overrides,
            sbatch_options,
            config=config or [],
            out=out,
            accelerate=accelerate,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            max_parallel=max_parallel,
            max_requeues=max_requeues,
            seeds=seeds,
        )
        for line in describe_skipped_runs(plan):
            print_to_stderr(line)
        if not plan.recipes:
            print("nothing left to submit")
            return
        submissions = prepare_submissions(plan.recipes, plan.jobs, plan.launch_file, plan.script_dir)
        if dry_run:
            for submission in submissions:
                print(submission.script_text)
            return
        print(describe_next_steps(submit_jobs(submissions)))


def _split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the recipe overrides and the sbatch options, the latter without their prefix."""
    sbatch_options = [argument for argument in arguments if argument.startswith(_SBATCH_PREFIX)]
    overrides = [argument for argument in arguments if argument not in sbatch_options]
    return overrides, [option.removeprefix(_SBATCH_PREFIX) for option in sbatch_options]


def status(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder of a run or a suite.")],
    as_json: JsonOption = False,
) -> None:
    """Show the state of each run in a folder; while it trains, also its step, loss, speed, memory use and time left.

    States: waiting, running, finished (including runs that ran out of memory or diverged), preempted (stopped
    early with a checkpoint: time limit, SLURM preemption or Ctrl-C), failed, refused (its input has an error),
    unreadable (its record is damaged), or gone (the process died without recording an outcome).
    """
    from peftbench.errors import SlurmError
    from peftbench.slurm.queue import QueuedJob, list_queued_jobs
    from peftbench.suite.status import collect_run_statuses, render_status_table

    with cli_errors():
        queue: dict[str, QueuedJob] = {}
        warning = ""
        try:
            queue = list_queued_jobs()
        except SlurmError as error:
            warning = f"warning: {error.message}; states of runs are read from their folders only"
        rows = collect_run_statuses(folder, queue)
        if warning:
            print_to_stderr(warning)
        print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else render_status_table(rows))
