"""Alias of ``peftbench show --run-dir`` for job scripts: ``python -m peftbench.slurm.folder --config RECIPE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.common.console import cli_errors, expand_home_in_args
from peftbench.common.usage_errors import PlainCommand
from peftbench.recipe.loader import load_recipe
from peftbench.run_dir.layout import RunDir

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=PlainCommand)
def print_run_dir(
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    config: Annotated[Optional[list[Path]], typer.Option("--config", help="Recipe file.")] = None,
) -> None:
    """Create the folder that a recipe's run writes to and print its path."""
    with cli_errors():
        print(RunDir.from_recipe(load_recipe(config or [], overrides or [])).create())


if __name__ == "__main__":
    app(expand_home_in_args(sys.argv[1:]))
