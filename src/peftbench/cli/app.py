"""The typer application: registers the commands of the other modules."""

from __future__ import annotations

from typing import Annotated

import typer

from peftbench.cli.cache import cache
from peftbench.cli.calibrate import calibrate
from peftbench.cli.data import data
from peftbench.cli.evaluate import evaluate
from peftbench.cli.export import export
from peftbench.cli.fit import fit
from peftbench.cli.memory import estimate
from peftbench.cli.renamed import CommandGroup
from peftbench.cli.report import compare, report
from peftbench.cli.show import show
from peftbench.cli.slurm import status, submit
from peftbench.cli.suite import run
from peftbench.cli.train import train
from peftbench.common.options import TRAIN_HELP

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compare fine-tuning methods for causal language models: memory, cost and quality.",
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(f"peftbench {version('peftbench')}")
        raise typer.Exit


@app.callback()
def _read_global_options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Accept options without a command."""


for _command in (
    run,
    train,
    evaluate,
    export,
    submit,
    status,
    estimate,
    fit,
    calibrate,
    report,
    compare,
    show,
    data,
    cache,
):
    app.command(help=TRAIN_HELP if _command is train else None)(_command)


def main() -> None:
    """Run the command line."""
    app()
