"""Prints the folder that a recipe's run writes to, for scripts: python -m peftbench.slurm.folder --config RECIPE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.common.console import cli_errors
from peftbench.common.filesystem import write_error
from peftbench.recipe.loader import load_recipe
from peftbench.run_dir.layout import RunDir

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def print_run_dir(
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    config: Annotated[Optional[list[Path]], typer.Option("--config", help="A recipe.")] = None,
) -> None:
    """Print the folder that a recipe's run writes to."""
    with cli_errors():
        recipe = load_recipe(config or [], overrides or [])
        place = RunDir.from_recipe(recipe).path
        try:
            place.mkdir(parents=True, exist_ok=True)  # in which a file may have to be made
        except OSError as error:
            raise write_error(place, error) from error
        print(place)


if __name__ == "__main__":
    app()
