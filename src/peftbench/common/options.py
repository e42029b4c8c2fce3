"""Arguments and options of the command lines that take a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

RecipeArgument = Annotated[Optional[str], typer.Argument(metavar="RECIPE.yaml", help="Recipe file.")]
OverridesArgument = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="KEY.SUB=VALUE", help="Recipe keys to override, e.g. train.steps=100."),
]
ConfigOption = Annotated[
    Optional[list[Path]],
    typer.Option(
        "--config",
        metavar="FILE",
        help="File to merge into the recipe. Repeat the option for several; later files win.",
    ),
]
SkipFinishedOption = Annotated[
    bool, typer.Option("--skip-finished", metavar="", help="If the run has already finished, only print its outcome.")
]
PrintConfigOption = Annotated[
    bool, typer.Option("--print-config", metavar="", help="Print the complete recipe like peftbench show, and exit.")
]

TRAIN_HELP = """Run one recipe and write its results to record.json.

The last line on standard output is one JSON object with the outcome and the path of the record. The table, logs and \
progress go to standard error.

To run several processes: accelerate launch --config_file accel_configs/cpu2.yaml launch/train.py RECIPE.yaml
"""


def join_arguments(recipe: str | None, overrides: list[str] | None) -> list[str]:
    """Return the positional arguments: an override may be in the place of the recipe file."""
    return [*([] if recipe is None else [recipe]), *(overrides or [])]
