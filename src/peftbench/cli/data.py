"""The command ``data``: examples as token ids and labels, their lengths, and the faults of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from peftbench.common.console import cli_errors
from peftbench.common.options import ConfigOption, OverridesArgument, RecipeArgument, join_arguments

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe


def data(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    show: Annotated[int, typer.Option(min=0, help="Number of examples to print token by token.")] = 3,
    split: Annotated[str, typer.Option(help="Split to read: train, validation or test.")] = "train",
    ids: Annotated[bool, typer.Option("--ids", metavar="", help="Print the id of each token.")] = False,
    all_errors: Annotated[
        bool, typer.Option("--all-errors", metavar="", help="List every faulty row of the split, then exit.")
    ] = False,
) -> None:
    """Print examples as a run would train on them, and the lengths of all examples of a split.

    Nothing is trained and no weights are loaded. Labeled tokens are underlined in green.
    """
    from peftbench.common.libraries import quiet_libraries
    from peftbench.recipe.arguments import load_recipe_from_arguments

    with cli_errors():
        arguments = join_arguments(recipe, overrides)
        quiet_libraries()
        loaded = load_recipe_from_arguments("data", arguments, config or [])
        _check_split(split)
        if all_errors:
            _print_faults(loaded, split)
        else:
            _print_summary(loaded, split, show, ids=ids)


def _check_split(split: str) -> None:
    from peftbench.errors import OutOfRangeError, did_you_mean

    if split not in (splits := ("train", "validation", "test")):
        raise OutOfRangeError(f"--split {split!r} is not a split", did_you_mean(split, splits))


def _print_faults(recipe: Recipe, split: str) -> None:
    from peftbench.training.data_summary import list_all_faults

    faults = list_all_faults(recipe, split)
    for fault in faults:
        print(fault)
    if faults:
        raise typer.Exit(faults[0].exit_code)
    print(f"every row of the {split} split can be used")


def _print_summary(recipe: Recipe, split: str, num_shown: int, *, ids: bool) -> None:
    from peftbench.cli.data_view import print_examples, print_lengths
    from peftbench.training.auto_settings import resolve_task
    from peftbench.training.data_summary import build_split_encoder, summarize_split

    resolved, notes = resolve_task(recipe)
    for note in notes:
        print(note)
    encoder = build_split_encoder(resolved)
    summary = summarize_split(resolved, encoder, split, num_shown)
    print_examples(summary, encoder, ids=ids)
    print_lengths(summary, overlong=resolved.data.overlong)
