"""Behavior that all command lines share: errors as one sentence, exit codes, renamed options."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import typer

from peftbench.common.text import expand_home
from peftbench.common.usage_errors import USAGE_EXIT_CODE
from peftbench.errors import EngineError, MissingFileError, OutputError, PeftbenchError

_SHOWN_CHARACTERS = 60
"""Number of characters of a too long path in its error."""
INTERRUPT_EXIT_CODE = 130
"""Exit code after Ctrl-C, as in shells."""


@contextmanager
def cli_errors(on_error: Callable[[dict[str, object]], None] | None = None, rank: int = 0) -> Iterator[None]:
    """Print a user's mistake as one sentence on standard error, without a traceback, and exit with its exit code.

    ``on_error`` receives the error as a dictionary, for a program that reads standard output. Of several processes, the
    one with ``rank`` 0 prints errors that are the same on every rank.
    """
    try:
        with _refuse_long_paths():
            yield
    except PeftbenchError as error:
        if rank == 0 or isinstance(error, (EngineError, OutputError)):  # the others are the same on every rank
            prefix = "" if rank == 0 else f"[rank {rank}] "
            print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        if on_error is not None:
            on_error({"outcome": "refused", "error": str(error), "exit_code": error.exit_code})
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was written; run the same command again", file=sys.stderr, flush=True)
        raise typer.Exit(INTERRUPT_EXIT_CODE) from None


@contextmanager
def _refuse_long_paths() -> Iterator[None]:
    """Raise a user's error for a path whose name is longer than the file system allows.

    Raises:
        MissingFileError: the file system refused such a path.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        start = str(error.filename)[:_SHOWN_CHARACTERS]
        raise MissingFileError(
            f"the path {start}... does not exist: a name in it is longer than the file system allows", "shorten it"
        ) from error


def expand_home_in_args(args: Sequence[str]) -> list[str]:
    """Return ``args`` with a leading ``~`` expanded, in values of options too: shells keep the one in --out=~/runs."""
    expanded = []
    for argument in args:
        option, equals, value = argument.partition("=")
        is_option = equals and option.startswith("--")
        expanded.append(f"{option}={expand_home(value)}" if is_option else expand_home(argument))
    return expanded


def refuse_renamed_options(args: Sequence[str], renamed: Mapping[str, str], subject: str | None = None) -> None:
    """Exit with a usage error if ``args`` has an old option; the message names what replaces it.

    ``renamed`` maps each old option to its replacement. ``subject`` replaces the old option in the message.
    """
    for argument in args:
        option = argument if argument in renamed else argument.partition("=")[0]
        if option in renamed:
            print(f"error: {subject or option} is now {renamed[option]}", file=sys.stderr, flush=True)
            raise SystemExit(USAGE_EXIT_CODE)
