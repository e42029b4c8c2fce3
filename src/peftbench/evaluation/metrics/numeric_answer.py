"""Numeric answers of arithmetic problems, as in GSM8K."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar

from peftbench.evaluation.metrics.base import TextMetric
from peftbench.record import ScoreDefinition
from peftbench.record.quality import PERCENT

_NUMBER = r"(?:(?<![0-9])-)?\$?(?:[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?%?"
_MARKED_NUMBER = re.compile(rf"####\s*({_NUMBER})")
_ANY_NUMBER = re.compile(_NUMBER)
_MAX_DIGITS = 100
"""A longer number is never equal; Python refuses to convert more than 4,300 digits."""


class NumericAnswer(TextMetric):
    """Equality of numbers (Cobbe et al. 2021, Training verifiers to solve math problems), by the package
    math-verify: 1,000 equals 1000.0, and 3/4 equals 0.75.

    The strict score takes the number after ``####``, the flexible one the last number, like the two filters of
    lm-evaluation-harness's gsm8k. The reference's number is the one after ``####``, or its last.
    """

    name: ClassVar[str] = "numeric_answer"
    scores: Mapping[str, ScoreDefinition] = {
        name: ScoreDefinition(
            title=title,
            description=f"Generated texts {what} the reference's, in percent",
            unit=PERCENT,
            digits=1,
            higher_is_better=True,
            low=0,
            high=100,
        )
        for name, title, what in (
            ("answer_strict", "numeric answer, strict", "whose number after #### equals"),
            ("answer_flexible", "numeric answer, flexible", "whose last number equals"),
        )
    }

    def import_libraries(self) -> None:
        import math_verify  # noqa: F401

    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        strict, flexible = [], []
        for text, reference in zip(generated, references, strict=True):
            expected = find_marked_number(reference) or find_last_number(reference)
            strict.append(100.0 * are_equal_numbers(find_marked_number(text), expected))
            flexible.append(100.0 * are_equal_numbers(find_last_number(text), expected))
        return {"answer_strict": tuple(strict), "answer_flexible": tuple(flexible)}


def find_marked_number(text: str) -> str | None:
    """Return the first number that follows ``####``; None without one."""
    match = _MARKED_NUMBER.search(text)
    return match[1] if match else None


def find_last_number(text: str) -> str | None:
    """Return the last number of a text; None without one."""
    numbers = _ANY_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def are_equal_numbers(number: str | None, expected: str | None) -> bool:
    """True if both are known and equal as numbers."""
    if number is None or expected is None or max(len(number), len(expected)) > _MAX_DIGITS:
        return False
    from math_verify import verify

    first, second = _parse(expected), _parse(number)
    return bool(first and second and verify(first, second, timeout_seconds=None))


@cache
def _parse(number: str) -> list[object]:
    """Return the number as math-verify represents it. Its time limits use signals and are off: a number is short."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that the limits are off
    plain = number.replace("\u2212", "-").replace("$", "").replace(",", "")
    return list(parse(plain, parsing_timeout=None))
