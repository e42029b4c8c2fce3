"""The entry point of one run: ``launch/train.py`` and ``python -m peftbench.train``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftbench.common.console import cli_errors, refuse_renamed_options
from peftbench.common.libraries import quiet_libraries
from peftbench.distributed import launcher_env
from peftbench.recipe.loader import load_recipe, to_commented_yaml
from peftbench.record import EXIT_CODES, Outcome, RunRecord
from peftbench.run.result_line import build_result_line, exit_immediately, is_main_process, print_result_line
from peftbench.run.shutdown import ShutdownSignal, ignore_signals
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.results import load_existing_result

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe
    from peftbench.run.runner import Run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.SUB=VALUE", help="Recipe keys to override, e.g. train.steps=100."),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", help="Recipe file. Repeat the option to merge several; later files win."),
    ] = None,
    skip_finished: Annotated[
        bool,
        typer.Option("--skip-finished", metavar="", help="If the run has already finished, only print its outcome."),
    ] = False,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", metavar="", help="Print the resolved recipe like peftbench show, and exit."),
    ] = False,
) -> None:
    """Run one recipe and write its results to record.json.

    The last line on standard output is one JSON object with the outcome and the path of the record. Logs and progress
    go to standard error. To run several processes: accelerate launch --config_file accel_configs/cpu2.yaml
    launch/train.py --config RECIPE.yaml
    """
    with cli_errors(on_error=print_result_line, rank=launcher_env.get_rank()):
        recipe = load_recipe(config or [], overrides or [])
        if print_config:
            if is_main_process():
                print(to_commented_yaml(recipe), end="")
            return
        existing = _load_existing_result(recipe) if skip_finished else None
        if existing is not None:
            _print_existing_result(recipe, existing)
            raise typer.Exit(EXIT_CODES[existing.outcome.kind])
        outcome, record_path, exit_code = run_recipe(recipe)
        print_result_line(build_result_line(recipe.name, outcome, record_path))
        if outcome.kind != "ok" and launcher_env.get_world_size() > 1:
            exit_immediately(exit_code)
        raise typer.Exit(exit_code)


def _load_existing_result(recipe: Recipe) -> RunRecord | None:
    """Return the record of a finished run; a run of another device that resolved ``auto`` differently is none."""
    if not RunDir.from_recipe(recipe).record_file.exists():
        return None
    with contextlib.redirect_stdout(sys.stderr):
        quiet_libraries()
        from peftbench.training.auto_settings import resolve_for_launch

        return load_existing_result(resolve_for_launch(recipe)[0])


def _print_existing_result(recipe: Recipe, record: RunRecord) -> None:
    if is_main_process():
        print(f"{recipe.name} already has a result", file=sys.stderr, flush=True)
    print_result_line(build_result_line(recipe.name, record.outcome, RunDir.from_recipe(recipe).record_file))


def run_recipe(recipe: Recipe) -> tuple[Outcome, Path | None, int]:
    """Run ``recipe``; return the outcome, the path of the record if one was written, and the exit code.

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

        run: Run | None = None
        try:
            run = Run(recipe, shutdown_signal)
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
        app()
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()
