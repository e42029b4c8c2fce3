"""The typer application: registers the commands of the other modules."""

from __future__ import annotations

import typer

from peftbench.cli.memory import estimate, fit
from peftbench.cli.renamed import CommandGroup
from peftbench.cli.report import compare, report
from peftbench.cli.show import show
from peftbench.cli.slurm import status, submit
from peftbench.cli.suite import run

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compare fine-tuning methods for causal language models: memory, cost and quality.",
)
for _command in (run, submit, status, estimate, fit, report, compare, show):
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    app()
