"""A metric that is a function of the user's own, named module:function."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from peftbench.common.text import first_line
from peftbench.errors import MetricError
from peftbench.evaluation.metrics.base import TextMetric
from peftbench.record import ScoreDefinition

SEPARATOR = ":"
"""Between module and function; a name with it is that of a user's function."""


class UserFunction(TextMetric):
    """Calls ``function(predictions, references)``, which returns a number, or a dict of numbers, for each example.

    The module is imported from the working directory or the Python path, only when a recipe or command names it. Higher
    is better unless the function has an attribute ``higher_is_better = False``. Scores are named module:function, and
    those of a dict module:function/key.
    """

    name: ClassVar[str] = "module:function"

    def __init__(self, path: str) -> None:
        """``path`` is module:function."""
        self.path = path
        self._keys: tuple[str, ...] = ()

    @cached_property
    def function(self) -> Callable[[list[str], list[str]], Any]:
        """The function, imported at the first use."""
        module, _, name = self.path.partition(SEPARATOR)
        if (folder := str(Path.cwd())) not in sys.path:
            sys.path.append(folder)  # last, so that a file does not hide a library
        try:
            function = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # the module may raise anything
            raise MetricError(
                f"the metric {self.path} cannot be imported: {_describe(error)}",
                "give module:function of a module in the working directory or on the Python path",
            ) from error
        if not callable(function):
            raise MetricError(
                f"the metric {self.path} is not a function: {module} has no function {name!r}", "correct the name"
            )
        return function  # type: ignore[no-any-return]

    @property
    def scores(self) -> Mapping[str, ScoreDefinition]:  # type: ignore[override]
        """The score of the function, or those of the dicts that it returned."""
        name = self.path.partition(SEPARATOR)[2]
        titles = {f"{self.path}/{key}": f"{name}/{key}" for key in self._keys} or {self.path: name}
        return {path: self._define(title) for path, title in titles.items()}

    def _define(self, title: str) -> ScoreDefinition:
        return ScoreDefinition(
            title=title,
            description=f"Mean of {self.path}",
            unit=title,
            digits=3,
            higher_is_better=bool(getattr(self.function, "higher_is_better", True)),
        )

    def may_have_score(self, score: str) -> bool:
        return score == self.path or score.startswith(f"{self.path}/")

    def check(self) -> None:
        self.import_libraries()

    def import_libraries(self) -> None:
        _ = self.function

    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        try:
            values = list(self.function(list(generated), list(references)))
        except MetricError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise MetricError(
                f"the metric {self.path} failed: {_describe(error)}",
                "correct it; peftbench evaluate RUN --from-outputs computes it again without the model",
            ) from error
        if len(values) != len(generated):
            raise MetricError(
                f"the metric {self.path} returned a list of length {len(values)} for {len(generated)} examples",
                "return one number, or one dict of numbers, for each example",
            )
        rows = [value if isinstance(value, Mapping) else {"": value} for value in values]
        keys = tuple(rows[0])
        for number, row in enumerate(rows, 1):
            if tuple(row) != keys or not keys or not all(map(_is_finite_number, row.values())):
                raise MetricError(
                    f"the metric {self.path} returned {values[number - 1]!r} for example {number}",
                    "return a finite number for each example, or a dict of finite numbers with the same keys for each",
                )
        self._keys = () if keys == ("",) else keys
        return {path: tuple(float(row[key]) for row in rows) for path, key in zip(self.scores, keys, strict=True)}


def _is_finite_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _describe(error: Exception) -> str:
    name, message = type(error).__name__, first_line(error)
    return name if message == name else f"{name}: {message}"
