"""Commands and options that were renamed: the old spelling is refused with the new one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from typer.core import TyperGroup

from peftbench.common.console import expand_home_in_args, refuse_renamed_options
from peftbench.common.usage_errors import USAGE_EXIT_CODE, PlainUsageErrors
from peftbench.errors import did_you_mean

if TYPE_CHECKING:
    from typer._click.core import Context  # typer has its own copy of click

_YAML_SUFFIXES = (".yaml", ".yml")

RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "report": {
        "--into": "--update-file",
        "--block": "--marker",
        "--by": "--group-by",
        "--compare": "the command peftbench compare A B",
        "--threshold": "an option of peftbench compare A B",
        "--json": "an option of peftbench compare A B",
    },
    "estimate": {"--into": "--update-file", "--block": "--marker"},
    "fit": {"--allow": "--techniques"},
    "submit": {"--engine": "--accelerate", "--at-once": "--max-parallel", "--restarts": "--max-requeues"},
}
"""Command: old option: what replaces it."""


class CommandGroup(PlainUsageErrors, TyperGroup):
    """The commands in the order of their registration. Before parsing, old spellings are refused and ``~`` expanded."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Refuse an old spelling, then parse."""
        command = next((argument for argument in args if not argument.startswith("-")), "")
        command_args = args[args.index(command) + 1 :] if command else []
        if command and command not in self.commands:
            _refuse_unknown_command(command, list(self.commands))
        if command == "compare":
            _refuse_suite(command_args)
        refuse_renamed_options(command_args, RENAMED_OPTIONS.get(command, {}))
        return super().parse_args(ctx, expand_home_in_args(args))


def _refuse_unknown_command(command: str, known: Sequence[str]) -> NoReturn:
    print(f"error: there is no command {command!r}; {did_you_mean(command, known)}", file=sys.stderr, flush=True)
    raise SystemExit(USAGE_EXIT_CODE)


def _refuse_suite(args: Sequence[str]) -> None:
    """Refuse ``peftbench compare SUITE.yaml``, which is now ``peftbench run SUITE.yaml``."""
    suite = next((argument for argument in args if argument.endswith(_YAML_SUFFIXES)), None)
    if suite is not None:
        refuse_renamed_options([suite], {suite: f"peftbench run {suite}"}, subject=f"peftbench compare {suite}")
