"""Formatting of numbers, intervals and lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from typing import TypeVar

from peftbench.record import Interval

MAX_LISTED_LABELS = 4
"""Maximum number of labels listed in a sentence; the others are counted."""

CellValue = str | int | float | None
"""Raw value of a table cell."""
_CellValueT = TypeVar("_CellValueT", bound=CellValue)

_MAX_DECIMALS = 9
"""Maximum number of decimals; a bound closer to zero is shown as zero."""

_EXACT_CONTEXT = Context(prec=400)
"""Precision that represents any float exactly."""


def finite_or_none(value: _CellValueT) -> _CellValueT | None:
    """Return None for NaN and infinity, which JSON cannot represent; any other value unchanged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def join_with_and(items: Sequence[str], prefix: str = "") -> str:
    """Return ``a, b and c``, with ``prefix`` before each item but the first."""
    rest = [f"{prefix}{item}" for item in items[1:]]
    return " and ".join([", ".join([*items[:1], *rest[:-1]]), rest[-1]]) if rest else items[0]


def truncate_list(labels: Sequence[str]) -> list[str]:
    """Return the first ``MAX_LISTED_LABELS`` labels and, if there are more, their number."""
    return [
        *labels[:MAX_LISTED_LABELS],
        *([f"{len(labels) - MAX_LISTED_LABELS} more"] if len(labels) > MAX_LISTED_LABELS else []),
    ]


def round_outward(interval: Interval, decimals: int) -> tuple[str, str]:
    """Return both ends, rounded away from the mean to at least ``decimals`` decimals.

    The shown interval contains the true one. If the true one excludes zero, as many decimals are used as it takes for
    the shown one to exclude zero too.
    """
    while decimals < _MAX_DECIMALS:
        low, high = (
            format_decimal(interval.low, decimals, ROUND_FLOOR),
            format_decimal(interval.high, decimals, ROUND_CEILING),
        )
        if interval.low <= 0 <= interval.high or (Decimal(low) > 0) or (Decimal(high) < 0):
            break
        decimals += 1
    return format_decimal(interval.low, decimals, ROUND_FLOOR), format_decimal(interval.high, decimals, ROUND_CEILING)


def format_decimal(value: float, decimals: int, rounding: str = ROUND_HALF_EVEN) -> str:
    """Return ``value`` with ``decimals`` decimals; zero has no sign."""
    text = f"{Decimal(value).quantize(Decimal(1).scaleb(-decimals), rounding=rounding, context=_EXACT_CONTEXT):f}"
    return text.removeprefix("-") if Decimal(text) == 0 else text


def decimal_places(text: str) -> int:
    """Return the number of decimals of a formatted number."""
    return len(text.partition(".")[2])
