"""The entry point of one run: ``launch/train.py`` and ``python -m peftbench.train``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from peftbench.common.console import cli_errors, expand_home_in_args, refuse_renamed_options
from peftbench.common.filesystem import path_exists
from peftbench.common.libraries import quiet_libraries
from peftbench.common.options import (
    TRAIN_HELP,
    ConfigOption,
    OverridesArgument,
    PrintConfigOption,
    RecipeArgument,
    SkipFinishedOption,
    join_arguments,
)
from peftbench.common.usage_errors import PlainCommand
from peftbench.distributed import launcher_env
from peftbench.errors import HubUnreachableError, ModelError, OutOfRangeError, RecordError, RunLockedError
from peftbench.evaluation.metrics.selection import check_metrics
from peftbench.recipe.arguments import load_recipe_from_arguments
from peftbench.recipe.loader import load_recipe, to_commented_yaml
from peftbench.record import EXIT_CODES, RECORD_FILE, Outcome, RunRecord, read_record
from peftbench.run.result_line import build_result_line, exit_immediately, is_main_process, print_result_line
from peftbench.run.shutdown import ShutdownSignal, ignore_signals
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.refusal import Refusal, delete_refusal, write_refusal
from peftbench.run_dir.results import load_existing_result
from peftbench.run_dir.stop_request import ATTEMPT_ENV

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe
    from peftbench.run.runner import Run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=PlainCommand, help=TRAIN_HELP)
def train(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    skip_finished: SkipFinishedOption = False,
    print_config: PrintConfigOption = False,
) -> None:
    """Parse the command line of ``launch/train.py``."""
    train_from_arguments(
        join_arguments(recipe, overrides), config or [], skip_finished=skip_finished, print_config=print_config
    )


def train_from_arguments(
    arguments: list[str], config: list[Path], *, skip_finished: bool = False, print_config: bool = False
) -> None:
    """Run the recipe that the arguments describe, print its outcome and exit with its exit code.

    With ``print_config`` only print the recipe.
    """
    recipe: Recipe | None = None

    def report_refusal(result: dict[str, object]) -> None:
        print_result_line(result)
        if recipe is not None:
            _keep_refusal(recipe, result)

    with cli_errors(on_error=report_refusal, rank=launcher_env.get_rank()):
        recipe = load_recipe_from_arguments("train", arguments, config)
        if print_config:
            if is_main_process():
                print(to_commented_yaml(recipe), end="")
            return
        _print_untimed_note(recipe)
        existing = _load_existing_result(recipe) if skip_finished else None
        if existing is not None:
            delete_refusal(RunDir.from_recipe(recipe).path)
            _print_existing_result(recipe, existing)
            raise typer.Exit(EXIT_CODES[existing.outcome.kind])
        _end_run(recipe, *run_recipe(recipe))


def _keep_refusal(recipe: Recipe, result: dict[str, object]) -> None:
    """Write the error of a refused run to its folder, if a suite or a job started it.

    If the folder is in use, the process that uses it is not refused.
    """
    if ATTEMPT_ENV in os.environ and is_main_process() and result["exit_code"] != RunLockedError.exit_code:
        write_refusal(RunDir.from_recipe(recipe).path, Refusal(error=str(result["error"])))


def evaluate_from_arguments(
    run: Path, overrides: list[str], *, from_outputs: bool, metrics: Sequence[str] = ()
) -> None:
    """Evaluate the saved model in the folder ``run``; print its outcome and exit with its exit code.

    With ``from_outputs`` only compute the metrics of its saved outputs: those of the recipe or, if there are any,
    ``metrics``, which are added to the record.
    """
    with cli_errors(on_error=print_result_line, rank=launcher_env.get_rank()):
        if metrics and not from_outputs:
            raise OutOfRangeError(
                "--metric computes metrics from saved outputs and needs --from-outputs",
                "to evaluate the model, give evaluate.metrics instead, e.g. evaluate.metrics=[exact_match]",
            )
        recipe = _load_recipe_of_run(run, overrides)
        if not recipe.method.is_trainable and not from_outputs:
            raise RecordError(f"{run} is a run of {recipe.method.kind}, which saves no model", "run it again")
        if from_outputs:
            with contextlib.redirect_stdout(sys.stderr):
                quiet_libraries()
                from peftbench.run.rescoring import rescore_outputs

                check_metrics(recipe)
                outcome, path = rescore_outputs(recipe, metrics)
            _end_run(recipe, outcome, path, EXIT_CODES[outcome.kind])
        _end_run(recipe, *run_recipe(recipe, evaluate_only=True))


def _end_run(recipe: Recipe, outcome: Outcome, record_path: Path | None, exit_code: int) -> NoReturn:
    """Print the table and the result line of a run, and exit with its exit code."""
    _print_table(record_path)
    print_result_line(build_result_line(recipe.name, outcome, record_path))
    if outcome.kind != "ok" and launcher_env.get_world_size() > 1:
        exit_immediately(exit_code)
    raise typer.Exit(exit_code)


def _load_recipe_of_run(run: Path, overrides: list[str]) -> Recipe:
    """Return the recipe in a run's record with overrides; its folder is ``run``, wherever that was moved.

    Raises:
        RecordError: the folder has no record, or one without a model.
        RecipeError: an override is invalid.
    """
    folder = run.parent if run.name == RECORD_FILE else run
    record_file = RunDir(folder).record_file
    if not path_exists(record_file):
        raise RecordError(f"{folder} has no {RECORD_FILE}", "give the folder of a run that was trained")
    read_record(record_file)
    recipe = load_recipe([record_file], overrides)
    folder = folder.absolute()
    return recipe.model_copy(update={"name": folder.name, "output_dir": str(folder.parent)})


def _print_untimed_note(recipe: Recipe) -> None:
    """Print before the run that no step will be timed; with train.epochs the number of steps is not known yet."""
    from peftbench.profiler.throughput import explain_untimed_run

    steps = recipe.train.steps if recipe.method.is_trainable else None
    note = None if steps is None else explain_untimed_run(recipe.profile.untimed_steps, steps)
    if note is not None and is_main_process():
        print(f"note: {note}", file=sys.stderr, flush=True)


def _print_table(record_path: Path | None) -> None:
    """Print the table of a single run to standard error; a suite and a job print or report all their runs."""
    if record_path is None or not is_main_process() or ATTEMPT_ENV in os.environ:
        return
    from rich.console import Console

    from peftbench.report.tables.table import print_table

    record = read_record(record_path)
    print_table([record], record.name, Console(stderr=True))


def _load_existing_result(recipe: Recipe) -> RunRecord | None:
    """Return the record of a finished run; a run of another device that resolved ``auto`` differently is none."""
    if not path_exists(RunDir.from_recipe(recipe).record_file):
        return None
    with contextlib.redirect_stdout(sys.stderr):
        quiet_libraries()
        from peftbench.training.auto_settings import resolve_for_launch, resolve_task

        recipe, _ = resolve_task(recipe)
        try:
            resolved = resolve_for_launch(recipe)[0]
        except (ModelError, HubUnreachableError):  # the model is not needed for a result that exists
            if recipe.has_auto_settings:
                raise
            resolved = recipe.with_resolved_dtype()
        return load_existing_result(resolved)


def _print_existing_result(recipe: Recipe, record: RunRecord) -> None:
    if is_main_process():
        print(f"{recipe.name} already has a result", file=sys.stderr, flush=True)
    print_result_line(build_result_line(recipe.name, record.outcome, RunDir.from_recipe(recipe).record_file))


def run_recipe(recipe: Recipe, *, evaluate_only: bool = False) -> tuple[Outcome, Path | None, int]:
    """Run ``recipe``; return the outcome, the path of the record if one was written, and the exit code.

    With ``evaluate_only`` evaluate the saved model of its training.

    Output that libraries print to standard output is redirected to standard error.

    Raises:
        PeftbenchError: the recipe cannot be run; nothing was written.
    """
    with contextlib.redirect_stdout(sys.stderr):
        shutdown_signal = ShutdownSignal()
        shutdown_signal.install_handlers()
        quiet_libraries()
        from peftbench.run.outcome import resolve_error
        from peftbench.run.runner import Run
        from peftbench.run.training_plan import plan_training

        run: Run | None = None
        try:
            run = Run(recipe, shutdown_signal, evaluate_only=evaluate_only, planner=plan_training)
            run.abort_on_rank_failure()
            record, path = run.execute()
        except Exception as error:
            record_path = run.record_path if run is not None else None
            outcome, exit_code = resolve_error(error, record_path)
            return outcome, record_path, exit_code
        return record.outcome, path, EXIT_CODES[record.outcome.kind]


def main() -> None:
    """Run the command line."""
    refuse_renamed_options(sys.argv[1:], {"--unless-finished": "--skip-finished"})
    try:
        app(expand_home_in_args(sys.argv[1:]))
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()
