"""The commands ``submit`` and ``status``: runs as SLURM jobs, and the state of all runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.cli.options import JsonOption, OutOption, OverridesArgument, SeedsOption, print_to_stderr
from peftbench.common.console import cli_errors

_SBATCH_PREFIX = "slurm."


def submit(
    target: Annotated[Path, typer.Argument(metavar="SUITE_OR_RECIPE", help="Suite or recipe file.")],
    overrides: OverridesArgument = None,
    engine: Annotated[
        Optional[str],
        typer.Option(help="Config of accel_configs/, e.g. zero2, or a file. Default: the suite's, or one process."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes per run.")] = 1,
    gpus_per_node: Annotated[
        Optional[int], typer.Option(min=0, help="GPUs per node; 0 for CPU. Default: the engine config's number, or 1.")
    ] = None,
    max_parallel: Annotated[
        Optional[int], typer.Option(min=1, help="Max. concurrent array tasks. Default: all.")
    ] = None,
    max_requeues: Annotated[int, typer.Option(min=0, help="Max. requeues after the time limit.")] = 10,
    seeds: SeedsOption = None,
    out: OutOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write all files and print the script, but do not submit it.")
    ] = False,
) -> None:
    """Submit a suite to SLURM as a job array, or a recipe as one job. slurm.OPTION=VALUE sets an sbatch option."""
    from peftbench.slurm.submit import prepare_submission, submit_job
    from peftbench.suite.slurm_jobs import describe_next_steps, describe_skipped_runs, plan_submission

    with cli_errors():
        arguments = overrides or []
        plan = plan_submission(
            target,
            [argument for argument in arguments if not argument.startswith(_SBATCH_PREFIX)],
            [argument.removeprefix(_SBATCH_PREFIX) for argument in arguments if argument.startswith(_SBATCH_PREFIX)],
            out=out,
            engine=engine,
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
        submission = prepare_submission(plan.recipes, plan.job, plan.launch_file, plan.script_dir)
        if dry_run:
            print(submission.script_text)
            return
        print(describe_next_steps(submit_job(submission)))


def status(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a run or a suite.")],
    as_json: JsonOption = False,
) -> None:
    """List the runs in a folder by state: waiting, running, finished, preempted, failed or gone."""
    from peftbench.errors import SlurmError
    from peftbench.slurm.queue import QueuedJob, list_queued_jobs
    from peftbench.suite.status import collect_run_statuses, render_status_table

    with cli_errors():
        queue: dict[str, QueuedJob] = {}
        try:
            queue = list_queued_jobs()
        except SlurmError as error:
            print_to_stderr(f"the states come from files alone: {error.message}")
        rows = collect_run_statuses(folder, queue)
        print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else render_status_table(rows))
