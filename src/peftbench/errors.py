"""Errors that a user can fix, and the exit code of each.

::

    PeftbenchError                     1
    ├── RecipeError                   10   an invalid recipe
    │   ├── UnknownKeyError           11   a key or name that does not exist; names the nearest one
    │   ├── WrongTypeError            12   a value of the wrong type
    │   ├── OutOfRangeError           13   a value out of range, or two values that contradict each other
    │   └── MissingFileError          14   a file named on the command line or in a recipe does not exist
    ├── DataError                     20   examples that cannot be used
    │   ├── DataNotFoundError         21   a data set that was not found; lists the places searched
    │   ├── EmptySplitError           22   a split without examples, or with too few
    │   ├── MissingColumnError        23   a column that does not exist; names the nearest one
    │   ├── SequenceTooShortError     24   no room for prompt plus summary
    │   └── HubUnreachableError       25   the Hub did not answer (for models too)
    ├── ModelError                    30   a base model that cannot be used
    │   ├── ModelNotFoundError        31   a base model that was not found, or a file of it that cannot be used
    │   ├── TargetModulesError        32   target modules, or names of parameters, that match nothing
    │   ├── UnsupportedModelError     33   an architecture that a method or recipe key does not support
    │   └── MergeError                34   an adapter that cannot be merged into its base model
    ├── EngineError                   40   the launched engine is not the one the recipe requests
    │   ├── PrecisionError            41   a precision that the device does not support
    │   ├── CombinationError          42   a method, optimizer or precision that the engine does not support
    │   ├── OptimizerError            43   an optimizer whose library is missing or does not work here
    │   └── CheckpointError           44   a checkpoint that this launch cannot resume from
    ├── OutputError                   50   a path that cannot be written
    │   ├── DiskFullError             51   no space left, or the quota is exceeded
    │   ├── RunLockedError            52   a run folder in which another process works
    │   └── UploadError               53   an upload that the Hub refused
    ├── RecordError                   60   a record that cannot be read
    ├── MetricError                   65   a metric that cannot be computed: its library is missing, or its code fails
    ├── BudgetError                   80   an invalid budget
    │   ├── DeviceError               81   an unknown device
    │   ├── EstimateUnavailableError  82   memory that cannot be estimated
    │   └── DoesNotFitError           83   a recipe that is not predicted to fit (``peftbench estimate --check``)
    └── SlurmError                    90   a job that SLURM cannot accept, or that would make no progress
        └── TimeLimitError            91   a time limit shorter than a step and its checkpoint

A run that started and did not succeed raises none of these: it has an outcome, with an exit code of its own
(``peftbench.record.EXIT_CODES``). A metric that regressed beyond its threshold ends ``peftbench compare`` with
``REGRESSION_EXIT_CODE``. Each message is one sentence: what was given, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

REGRESSION_EXIT_CODE = 61
"""Exit code of a comparison in which a metric regressed by more than its threshold."""


class PeftbenchError(Exception):
    """An error that a user can fix: one sentence, with an optional ``hint`` on what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class RecipeError(PeftbenchError):
    """An invalid recipe."""

    exit_code = 10


class UnknownKeyError(RecipeError):
    """A key or name that does not exist."""

    exit_code = 11


class WrongTypeError(RecipeError):
    """A value of the wrong type."""

    exit_code = 12


class OutOfRangeError(RecipeError):
    """A value out of range, or two values that contradict each other."""

    exit_code = 13


class MissingFileError(RecipeError):
    """A file named on the command line or in a recipe does not exist."""

    exit_code = 14


class DataError(PeftbenchError):
    """Examples that cannot be used."""

    exit_code = 20


class DataNotFoundError(DataError):
    """A data set that was not found."""

    exit_code = 21


class EmptySplitError(DataError):
    """A split without examples, or with too few."""

    exit_code = 22


class MissingColumnError(DataError):
    """A column that does not exist in the data set."""

    exit_code = 23


class SequenceTooShortError(DataError):
    """No room for prompt plus summary."""

    exit_code = 24


class HubUnreachableError(DataError):
    """The Hub did not answer."""

    exit_code = 25


class ModelError(PeftbenchError):
    """A base model that cannot be used."""

    exit_code = 30


class ModelNotFoundError(ModelError):
    """A base model that was not found, or whose config, weights or tokenizer cannot be used."""

    exit_code = 31


class TargetModulesError(ModelError):
    """Target modules, or an expression for names of parameters, that match nothing."""

    exit_code = 32


class UnsupportedModelError(ModelError):
    """An architecture that a method or recipe key does not support."""

    exit_code = 33


class MergeError(ModelError):
    """An adapter that cannot be merged into its base model."""

    exit_code = 34


class EngineError(PeftbenchError):
    """The launched engine is not the one the recipe requests, or its accelerate config is not valid."""

    exit_code = 40


class PrecisionError(EngineError):
    """A precision that the device does not support."""

    exit_code = 41


class CombinationError(EngineError):
    """A method, optimizer or precision that the engine does not support."""

    exit_code = 42


class OptimizerError(EngineError):
    """An optimizer whose library is missing or does not work here."""

    exit_code = 43


class CheckpointError(EngineError):
    """A checkpoint that this launch cannot resume from."""

    exit_code = 44


class OutputError(PeftbenchError):
    """A path that cannot be written."""

    exit_code = 50


class DiskFullError(OutputError):
    """No space left, or the quota is exceeded."""

    exit_code = 51


class RunLockedError(OutputError):
    """A run folder in which another process works."""

    exit_code = 52


class UploadError(OutputError):
    """An upload that the Hub refused."""

    exit_code = 53


class RecordError(PeftbenchError):
    """A record that cannot be read."""

    exit_code = 60


class MetricError(PeftbenchError):
    """A metric that cannot be computed: its library is missing, or its code fails."""

    exit_code = 65


class BudgetError(PeftbenchError):
    """An invalid budget."""

    exit_code = 80


class DeviceError(BudgetError):
    """An unknown device."""

    exit_code = 81


class EstimateUnavailableError(BudgetError):
    """Memory that cannot be estimated."""

    exit_code = 82


class DoesNotFitError(BudgetError):
    """A recipe that is not predicted to fit its budget."""

    exit_code = 83


class SlurmError(PeftbenchError):
    """A job that SLURM cannot accept, or that would make no progress."""

    exit_code = 90


class TimeLimitError(SlurmError):
    """A time limit shorter than a step and its checkpoint."""

    exit_code = 91


def did_you_mean(name: str, allowed: Iterable[str], prefix: str = "") -> str:
    """Return ``did you mean 'x'? (allowed: x, y, z)``, or only the allowed names if none is similar.

    Args:
        name: the unknown name.
        allowed: the known names.
        prefix: the section of a dotted key; it is shown before the suggested name.
    """
    names = list(allowed)
    completions = sorted((allowed_name for allowed_name in names if name and allowed_name.startswith(name)), key=len)
    close = completions[:1] or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"did you mean {prefix + close[0]!r}? (allowed: {listed})" if close else f"allowed: {listed}"
