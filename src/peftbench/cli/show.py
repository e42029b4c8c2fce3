"""The command ``show``: a complete recipe, its run folder, or the glossary of the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.common.console import cli_errors
from peftbench.common.options import ConfigOption, OverridesArgument, RecipeArgument, join_arguments


def show(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    glossary: Annotated[
        bool, typer.Option("--glossary", metavar="", help="Print the meaning of each table column.")
    ] = False,
    diff: Annotated[
        Optional[tuple[Path, Path]],
        typer.Option(
            "--diff", metavar="A B", help="Print the keys in which two recipes, or the records of two runs, differ."
        ),
    ] = None,
    run_dir: Annotated[
        bool,
        typer.Option(
            "--run-dir",
            metavar="",
            help="Instead of the recipe, print the path of its run folder; create the folder if it is missing.",
        ),
    ] = False,
) -> None:
    """Print the complete recipe, defaults and overrides included, with a one-line description of each key."""
    from peftbench.errors import RecipeError
    from peftbench.evaluation.metrics.registry import METRICS
    from peftbench.recipe.arguments import load_recipe_from_arguments
    from peftbench.recipe.differences import describe_recipe_differences
    from peftbench.recipe.loader import to_commented_yaml
    from peftbench.report.analysis.quality_metrics import QualityMetric
    from peftbench.report.tables.columns import list_columns
    from peftbench.run_dir.layout import RunDir

    with cli_errors():
        others = [*join_arguments(recipe, overrides), *map(str, config or [])]
        if others and (glossary or diff is not None):
            usage = "--glossary takes no argument" if glossary else "--diff takes two files"
            raise RecipeError(f"peftbench show {usage}, and {others[0]} was given too", "remove it")
        if glossary:
            scores = [QualityMetric(*item) for metric in METRICS.values() for item in metric.scores.items()]
            print("\n".join(f"{column.title}: {column.description}" for column in list_columns(scores)))
            return
        if diff is not None:
            print(describe_recipe_differences(*diff))
            return
        resolved = load_recipe_from_arguments("show", join_arguments(recipe, overrides), config or [])
        if run_dir:
            print(RunDir.from_recipe(resolved).create())
            return
        print(to_commented_yaml(resolved), end="")
