"""The command ``export``: write the model of a finished run as a folder to use elsewhere, and upload it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from peftbench.common.console import cli_errors

if TYPE_CHECKING:
    from peftbench.export.folder import Export


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run with a saved model.")],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", metavar="", help="Write a whole model: merge the adapter into its base, and check the logits."
        ),
    ] = False,
    output: Annotated[
        Optional[Path], typer.Option(help="Folder to write. Default: exports/ and the run's name.")
    ] = None,
    dtype: Annotated[
        Optional[Literal["fp32", "bf16", "fp16"]],
        typer.Option(help="Type of the weights with --merge. Default: that of the base model's files."),
    ] = None,
    push: Annotated[
        Optional[str],
        typer.Option(metavar="USER/NAME", help="Also upload the folder to a new repository on the Hub."),
    ] = None,
    private: Annotated[
        Optional[bool],
        typer.Option("--private/--public", help="Visibility of the repository of --push. Default: --private."),
    ] = None,
) -> None:
    """Write the model of a finished run to a new folder, with tokenizer, recipe and model card, and check it.

    A LoRA run has an adapter. --merge writes a whole model instead, which does not need peft.
    """
    from peftbench.errors import OutOfRangeError
    from peftbench.export.push import check_login, check_repository_name, push_folder

    with cli_errors():
        if push is None and private is not None:
            raise OutOfRangeError(f"--{'private' if private else 'public'} has no effect without --push; omit it")
        if push is not None:
            check_repository_name(push)
            check_login()
        with contextlib.redirect_stdout(sys.stderr):
            exported = _export(run, output, dtype, push, merge=merge)
        _print_export(exported)
        if push is not None:
            with contextlib.redirect_stdout(sys.stderr):
                url = push_folder(exported.folder, push, private=private is not False)
            print(f"pushed: {url}")


def _export(
    run: Path,
    output: Path | None,
    dtype: Literal["fp32", "bf16", "fp16"] | None,
    repository: str | None,
    *,
    merge: bool,
) -> Export:
    from peftbench.common.libraries import quiet_libraries

    quiet_libraries()
    from peftbench.export.folder import ExportRequest, export_model

    return export_model(ExportRequest(run, output, merge, dtype, repository))


def _print_export(exported: Export) -> None:
    """Print the check of a whole model to standard error, and the folder to standard output."""
    comparison = exported.comparison
    if comparison is not None:
        print(f"checked: {comparison.describe()}", file=sys.stderr)
        if comparison.missing_examples is not None:
            reason = comparison.missing_examples
            print(f"note: the run's own examples were not compared: {reason}", file=sys.stderr)
        if comparison.warning is not None:
            print(f"note: {comparison.warning}", file=sys.stderr)
    print(f"exported: {exported.folder}")
