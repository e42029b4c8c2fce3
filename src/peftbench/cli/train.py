"""The command ``train``: one recipe in this process."""

from __future__ import annotations

from peftbench.common.options import (
    ConfigOption,
    OverridesArgument,
    PrintConfigOption,
    RecipeArgument,
    SkipFinishedOption,
    join_arguments,
)


def train(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    skip_finished: SkipFinishedOption = False,
    print_config: PrintConfigOption = False,
) -> None:
    """Do what ``launch/train.py`` does, in one process."""
    from peftbench.run.shutdown import ignore_signals
    from peftbench.train import train_from_arguments

    try:
        train_from_arguments(
            join_arguments(recipe, overrides), config or [], skip_finished=skip_finished, print_config=print_config
        )
    finally:
        ignore_signals()
