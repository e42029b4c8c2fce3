"""The entry point of one run: ``launch/train.py`` and ``python -m peftbench.train``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from peftbench.common.console import cli_errors, get_launched_rank, quiet_libraries
from peftbench.distributed import launcher_env
from peftbench.errors import PeftbenchError
from peftbench.recipe.loader import load_recipe, to_commented_yaml
from peftbench.record import EXIT_CODES, RECORD_FILE, Outcome, RunRecord
from peftbench.run.shutdown import ShutdownSignal, ignore_signals
from peftbench.run_dir.results import load_existing_result

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe
    from peftbench.run.runner import Run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Knobs to change, as train.steps=100.")
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="A recipe; several are merged from left to right.")
    ] = None,
    unless_finished: Annotated[
        bool,
        typer.Option("--unless-finished", help="Leave a run alone that has its result: its outcome is told again."),
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe with each knob's meaning, and stop.")
    ] = False,
) -> None:
    """Run one recipe and write its record.

    The last line on standard output is one JSON object: the outcome, and the path of the record. Logs and progress go
    to standard error. Start several processes with "accelerate launch --config_file accel_configs/cpu2.yaml".
    """
    with cli_errors(on_error=print_result_line):
        recipe = load_recipe(config or [], overrides or [])
        if print_config:
            if get_launched_rank() == 0:
                print(to_commented_yaml(recipe), end="")
            return
        before = load_existing_result(recipe) if unless_finished else None
        if before is not None:
            _print_existing_result(recipe, before)
            raise typer.Exit(EXIT_CODES[before.outcome.kind])
        outcome, record, code = run_recipe(recipe)
        print_result_line(_build_result_line(recipe, outcome, record))
        if outcome.kind != "ok" and launcher_env.launched_world_size() > 1:
            _exit_immediately(code)
        raise typer.Exit(code)


def _print_existing_result(recipe: Recipe, record: RunRecord) -> None:
    if get_launched_rank() == 0:
        print(f"{recipe.name} has its result already", file=sys.stderr, flush=True)
    print_result_line(_build_result_line(recipe, record.outcome, Path(recipe.output_dir) / recipe.name / RECORD_FILE))


def run_recipe(recipe: Recipe) -> tuple[Outcome, Path | None, int]:
    """Run ``recipe``; returns the outcome, the path of the record written and the exit code.

    Whatever libraries print goes to standard error.

    Raises:
        PeftbenchError: the recipe cannot be run; nothing was written.
    """
    with contextlib.redirect_stdout(sys.stderr):
        folder = Path(recipe.output_dir) / recipe.name
        place = folder / RECORD_FILE
        stop = ShutdownSignal()
        stop.install_handlers()
        quiet_libraries()
        from peftbench.run.runner import Run

        started: Run | None = None
        try:
            started = Run(recipe, stop)
            started.failure_channel.watch(partial(_abort_with_failed_rank, started))
            outcome = started.execute()[0].outcome
        except PeftbenchError as error:
            if started is None or not started.is_record_written:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)  # what was measured is kept
            return Outcome(kind="failed", error=str(error)), place, error.exit_code
        except Exception as error:  # a fault of the program: whoever reads its traceback can mend it
            traceback.print_exc()
            kept = place if started is not None and started.is_record_written else None
            return Outcome(kind="failed", error=f"{type(error).__name__}: {error}"), kept, EXIT_CODES["failed"]
        return outcome, place, EXIT_CODES[outcome.kind]


def _abort_with_failed_rank(run: Run, failure: dict[str, Any]) -> None:
    """End this rank, which may wait for ever for one that is out of memory or gone; from a thread."""
    code = EXIT_CODES[failure["outcome"]["kind"]]
    try:
        if get_launched_rank() == 0:
            outcome, record = run.abort_with(failure)
            print(f"error: {outcome.error}", file=sys.stderr, flush=True)
            print_result_line(_build_result_line(run.recipe, outcome, record), sys.__stdout__)
        else:
            print(f"error: {failure['outcome']['error']}", file=sys.stderr, flush=True)
            run.failure_channel.wait_for_record()
    except PeftbenchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        print_result_line({"outcome": "failed", "name": run.recipe.name, "error": str(error)}, sys.__stdout__)
        code = error.exit_code
    except BaseException as error:  # whatever it is, the process must end, for others wait for it
        traceback.print_exc()
        print_result_line(
            {"outcome": "failed", "name": run.recipe.name, "error": f"{type(error).__name__}: {error}"}, sys.__stdout__
        )
        code = EXIT_CODES["failed"]
    finally:
        _exit_immediately(code)


def _exit_immediately(exit_code: int) -> NoReturn:
    """End the process without closing what binds it to others, which would wait for them."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    os._exit(exit_code)


def _build_result_line(recipe: Recipe, outcome: Outcome, record_path: Path | None) -> dict[str, object]:
    return {
        "outcome": outcome.kind,
        "record": None if record_path is None else str(record_path),
        "name": recipe.name,
        "error": outcome.error,
        "suggestion": outcome.suggestion,
    }


def print_result_line(result: dict[str, object], file: TextIO | None = None) -> None:
    """The last line on standard output, from one process."""
    if get_launched_rank() == 0:
        print(json.dumps({key: value for key, value in result.items() if value is not None}), flush=True, file=file)


def main() -> None:
    """Run the command line."""
    try:
        app()
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()
