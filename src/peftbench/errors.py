"""What can go wrong by a user's hand, and the exit code of each.

::

    PeftbenchError                     1
    ├── RecipeError                   10   a recipe that cannot be meant
    │   ├── UnknownKeyError           11   a key or a name that does not exist; names the nearest
    │   ├── WrongTypeError            12   a value of the wrong type
    │   ├── OutOfRangeError           13   a value outside what is allowed, or two that contradict each other
    │   └── MissingFileError          14   a file named on the command line or in a recipe is not there
    ├── DataError                     20
    │   ├── DataNotFoundError         21   a data set that is not there; says what was tried
    │   ├── EmptySplitError           22
    │   ├── MissingColumnError        23   names the nearest column
    │   ├── SequenceTooShortError     24   no room for prompt plus summary
    │   └── HubUnreachableError       25   the hub did not answer (models too)
    ├── ModelError                    30
    │   ├── ModelNotFoundError        31   a base that is not there; says what was tried
    │   ├── TargetModulesError        32   target modules that match nothing
    │   └── UnsupportedModelError     33   an architecture a method cannot handle
    ├── EngineError                   40   the engine that started is not the one asked for
    │   ├── PrecisionError            41   a precision this device does not have
    │   ├── CombinationError          42   a method, optimizer or precision that this engine cannot run
    │   ├── OptimizerError            43   an optimizer whose library is not there, or cannot be used here
    │   └── CheckpointError           44   a checkpoint that this engine cannot go on from
    ├── OutputError                   50   a place that cannot be written
    │   ├── DiskFullError             51
    │   └── BusyError                 52   a folder in which another process works
    ├── RecordError                   60   a record that cannot be read
    ├── BudgetError                   80   a budget that cannot be meant
    │   ├── DeviceError               81   a device of which nothing is known
    │   ├── NotEstimatedError         82   a memory that is not predicted, instead of a wrong figure
    │   └── NoRoomError               83   a budget below the weights alone
    └── SlurmError                    90   a job that SLURM cannot be given, or that would lead nowhere
        └── TimeLimitError            91   a time that ends before a step does

A run that started and did not end well is no exception but an outcome, with an exit code of its own
(``peftbench.record.EXIT_CODES``); nor is a figure that fell, for which ``report --compare`` ends with ``REGRESSED``.
Each message is one sentence: what was given, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

REGRESSION_EXIT_CODE = 61
"""Exit code of a comparison in which a figure fell by more than its threshold."""


class PeftbenchError(Exception):
    """A mistake that one sentence explains. ``hint``, where there is one, says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class RecipeError(PeftbenchError):
    """A recipe that cannot be meant."""

    exit_code = 10


class UnknownKeyError(RecipeError):
    """A key or a name that does not exist."""

    exit_code = 11


class WrongTypeError(RecipeError):
    """A value of the wrong type."""

    exit_code = 12


class OutOfRangeError(RecipeError):
    """A value outside what is allowed, or two that contradict each other."""

    exit_code = 13


class MissingFileError(RecipeError):
    """A file named on the command line or in a recipe is not there."""

    exit_code = 14


class DataError(PeftbenchError):
    """Examples that cannot be used."""

    exit_code = 20


class DataNotFoundError(DataError):
    """A data set that is not there."""

    exit_code = 21


class EmptySplitError(DataError):
    """A split without examples, or without enough of them."""

    exit_code = 22


class MissingColumnError(DataError):
    """A column that a data set does not have."""

    exit_code = 23


class SequenceTooShortError(DataError):
    """No room for prompt plus summary."""

    exit_code = 24


class HubUnreachableError(DataError):
    """The hub did not answer."""

    exit_code = 25


class ModelError(PeftbenchError):
    """A base that cannot be used."""

    exit_code = 30


class ModelNotFoundError(ModelError):
    """A base that is not there."""

    exit_code = 31


class TargetModulesError(ModelError):
    """Target modules that match nothing."""

    exit_code = 32


class UnsupportedModelError(ModelError):
    """An architecture that a method or a knob cannot handle."""

    exit_code = 33


class EngineError(PeftbenchError):
    """The engine that started is not the one asked for."""

    exit_code = 40


class PrecisionError(EngineError):
    """A precision that this device does not have."""

    exit_code = 41


class CombinationError(EngineError):
    """A method, optimizer or precision that the engine cannot run."""

    exit_code = 42


class OptimizerError(EngineError):
    """An optimizer whose library is not there, or cannot be used here."""

    exit_code = 43


class CheckpointError(EngineError):
    """A checkpoint that this engine or number of processes cannot go on from."""

    exit_code = 44


class OutputError(PeftbenchError):
    """A place that cannot be written."""

    exit_code = 50


class DiskFullError(OutputError):
    """No space left, or the quota is used up."""

    exit_code = 51


class RunLockedError(OutputError):
    """A folder in which another process works."""

    exit_code = 52


class RecordError(PeftbenchError):
    """A record that cannot be read."""

    exit_code = 60


class BudgetError(PeftbenchError):
    """A budget that is no size, or that nothing could fit."""

    exit_code = 80


class DeviceError(BudgetError):
    """A device of which nothing is known."""

    exit_code = 81


class EstimateUnavailableError(BudgetError):
    """A memory that is not predicted, instead of a wrong figure."""

    exit_code = 82


class BudgetTooSmallError(BudgetError):
    """A budget below the weights alone."""

    exit_code = 83


class SlurmError(PeftbenchError):
    """A job that SLURM cannot be given, or that would lead nowhere."""

    exit_code = 90


class TimeLimitError(SlurmError):
    """A time that ends before a step and its checkpoint do."""

    exit_code = 91


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """``did you mean 'x'? (allowed: x, y, z)``, or the allowed names alone where none is near."""
    names = list(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"did you mean {close[0]!r}? (allowed: {listed})" if close else f"allowed: {listed}"
