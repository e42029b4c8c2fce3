"""The command ``run``: all runs of a suite on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftbench.cli.options import AccelerateOption, OutOption, SeedsOption, print_to_stderr
from peftbench.common.console import INTERRUPT_EXIT_CODE, cli_errors
from peftbench.common.options import ConfigOption, OverridesArgument

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe
    from peftbench.suite.launch import RunResult
    from peftbench.suite.results import ResultFinder


def run(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="Suite file: lists recipes and the keys to vary.")],
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    out: OutOption = None,
    accelerate: AccelerateOption = None,
    seeds: SeedsOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar="",
            help="Run nothing. List the runs, which of them would be skipped and why, their disk space and, where "
            "known, their wall-clock hours.",
        ),
    ] = False,
) -> None:
    """Run all runs of a suite in new processes; print the table and the summary, and write the report page.

    Runs that have finished are skipped; interrupted ones resume.
    """
    from peftbench.distributed.accelerate_config import find_accelerate_config, read_accelerate_config
    from peftbench.recipe.arguments import check_is_recipe, check_is_suite, refuse_second_file
    from peftbench.suite.dry_run import format_planned_runs, plan_runs
    from peftbench.suite.expand import expand, read_suite, resolve_accelerate_config
    from peftbench.suite.launch import run_suite
    from peftbench.suite.results import ResultFinder

    with cli_errors():
        check_is_suite(suite, "run")
        for file in config or []:
            check_is_recipe(file, "run --config")
        refuse_second_file("run", overrides or [])
        recipes = expand(suite, overrides or [], out, seeds, config or [])
        title = read_suite(suite).name
        accelerate_config = find_accelerate_config(accelerate) if accelerate else resolve_accelerate_config(suite)
        if accelerate_config is not None:
            read_accelerate_config(accelerate_config)  # each run would fail on it
        if dry_run:
            print(format_planned_runs(plan_runs(recipes, accelerate_config)))
            return
        try:
            results = run_suite(recipes, accelerate_config, print_to_stderr)
        except KeyboardInterrupt:
            print_to_stderr("interrupted: finished runs are kept; run the same command again to resume")
            raise typer.Exit(INTERRUPT_EXIT_CODE) from None
        failed = [result for result in results if not result.succeeded]
        _report_results(recipes, failed, title, ResultFinder(accelerate_config))
        for result in failed:
            print_to_stderr(f"{result.name}: {result.outcome}" + (f": {result.error}" if result.error else ""))
        if failed:
            raise typer.Exit(1)


def _report_results(recipes: list[Recipe], failed: list[RunResult], title: str, finder: ResultFinder) -> None:
    """Write and print the report of the runs; do nothing if there are neither records nor failed runs."""
    from peftbench.cli.report_actions import print_report
    from peftbench.report.page.content import UnfinishedRun
    from peftbench.report.writer import write_report
    from peftbench.run_dir.layout import RunDir

    record_by_path = {RunDir.from_recipe(recipe).record_file: finder.find_matching_record(recipe) for recipe in recipes}
    records = {path: record for path, record in record_by_path.items() if record is not None}
    if not records and not failed:
        return
    names = {record.name for record in records.values()}
    unfinished = [
        UnfinishedRun(result.name, result.outcome, result.shareable_error or result.error or "")
        for result in failed
        if result.name not in names
    ]
    print_report(write_report(records, Path(recipes[0].output_dir), title, unfinished_runs=unfinished), title)
