"""Errors of the command line itself as one sentence: unknown options, missing arguments, values of a wrong type."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import typer
from pydantic import ValidationError
from typer._click import exceptions
from typer.core import TyperCommand

from peftbench.common.output_encoding import replace_unencodable_characters
from peftbench.common.validation_errors import describe_requirement
from peftbench.errors import did_you_mean

if TYPE_CHECKING:
    from typer._click.core import Context

USAGE_EXIT_CODE = 2
"""Exit code of a command line that cannot be parsed, as in click."""


class PlainUsageErrors:
    """Mixin of a typer command or group: a usage error is one sentence, and every character can be printed."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:  # noqa: ANN401 — click's signature
        """Parse and run the command line; see click's ``Command.main``."""
        replace_unencodable_characters()
        run = super().main  # type: ignore[misc]
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            exit_code = run(*args, standalone_mode=False, **extra)
        except exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except exceptions.ClickException as error:
            typer.echo(f"error: {describe_usage_error(error)}", err=True)
            sys.exit(error.exit_code)
        sys.exit(exit_code if isinstance(exit_code, int) else 0)


class PlainCommand(PlainUsageErrors, TyperCommand):
    """A command that is an application of its own."""


def describe_usage_error(error: exceptions.ClickException) -> str:
    """Return one sentence: what was given, what is allowed, what to do."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "peftbench"
    if isinstance(error, exceptions.NoSuchOption):
        return f"{command} has no option {error.option_name}; {did_you_mean(error.option_name, _list_options(context))}"
    if isinstance(error, exceptions.MissingParameter):
        name = _get_name(error)
        return f"{command} needs {name}; give it, or see {command} --help"
    if isinstance(error, exceptions.BadParameter):
        return _describe_bad_value(error)
    if isinstance(error, exceptions.BadOptionUsage):
        needs = "takes no value" if "does not take" in error.message else "needs a value"
        return f"option {error.option_name} {needs}; see --help"
    if extra := re.search(r"unexpected extra argument.* \(([^()]*)\)$", error.message):
        return f"{command} takes no argument {extra.group(1)!r}; see {command} --help"
    return f"the command line of {command} is not valid; see {command} --help"


def _list_options(context: Context | None) -> list[str]:
    parameters = context.command.get_params(context) if context is not None else []
    return sorted(option for parameter in parameters for option in parameter.opts if option.startswith("--"))


def _get_name(error: exceptions.BadParameter) -> str:
    """Return the option, or the argument's placeholder."""
    if error.param is None:
        return "an argument"
    if error.param.param_type_name == "option":
        return max(error.param.opts, key=len)
    return error.param.metavar or str(error.param.name).upper()


def _describe_bad_value(error: exceptions.BadParameter) -> str:
    name, cause = _get_name(error), error.__cause__
    if not isinstance(cause, ValidationError):
        return f"the value of {name} is not allowed; see --help"
    first = cause.errors()[0]
    return f"{name}={first['input']} is not an allowed value; it must be {describe_requirement(first)}"
