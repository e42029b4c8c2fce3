"""The command ``show``: a resolved recipe, its run folder, or the glossary of the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.common.console import cli_errors


def show(
    recipe: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="RECIPE.yaml | KEY.SUB=VALUE", help="Recipe files, then overrides. Later files win."),
    ] = None,
    glossary: Annotated[
        bool, typer.Option("--glossary", metavar="", help="Print the meaning of each table column.")
    ] = False,
    run_dir: Annotated[
        bool,
        typer.Option(
            "--run-dir",
            metavar="",
            help="Instead of the recipe, print the path of its run folder; create the folder if it is missing.",
        ),
    ] = False,
) -> None:
    """Print the resolved recipe with a one-line description of each key."""
    from peftbench.recipe.loader import load_recipe, to_commented_yaml
    from peftbench.report.tables.columns import COLUMNS
    from peftbench.run_dir.layout import RunDir

    with cli_errors():
        if glossary:
            print("\n".join(f"{column.title}: {column.description}" for column in COLUMNS))
            return
        arguments = recipe or []
        # An existing file is a recipe even if its path has a "=", as the folders of a suite's axes have.
        overrides = [argument for argument in arguments if "=" in argument and not Path(argument).is_file()]
        resolved = load_recipe([Path(argument) for argument in arguments if argument not in overrides], overrides)
        if run_dir:
            print(RunDir.from_recipe(resolved).create())
            return
        print(to_commented_yaml(resolved), end="")
