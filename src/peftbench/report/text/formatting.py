"""Methods by their kind, and lists in words."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

from peftbench.record import Interval, RunRecord

MAX_LISTED_LABELS = 4
"""Labels in a sentence, before the others are counted."""


def method_kind(record: RunRecord) -> str:
    """The method's kind."""
    return str(record.recipe["method"]["kind"])


def join_with_and(words: Sequence[str], prefix: str = "") -> str:
    """``a, b and c``; a ``joint`` stands before each but the first."""
    rest = [f"{prefix}{word}" for word in words[1:]]
    return " and ".join([", ".join([*words[:1], *rest[:-1]]), rest[-1]]) if rest else words[0]


def truncate_list(labels: Sequence[str]) -> list[str]:
    """The first ``NAMED`` of ``labels``, and how many more there are."""
    return [
        *labels[:MAX_LISTED_LABELS],
        *([f"{len(labels) - MAX_LISTED_LABELS} more"] if len(labels) > MAX_LISTED_LABELS else []),
    ]


_MAX_DECIMALS = 9
"""Behind the point: a bound nearer to zero than that is shown as zero."""

_EXACT_CONTEXT = Context(prec=400)
"""Digits that hold any float."""


def round_outward(interval: Interval, decimals: int) -> tuple[str, str]:
    """Both ends, rounded away from the mean to ``digits`` behind the point, or to more.

    A shown interval holds what the true one does. One that excludes zero must not be shown as one that reaches it, so
    that then there are as many digits as it takes.
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
    """``value`` to ``digits`` behind the point; zero has no sign."""
    text = f"{Decimal(value).quantize(Decimal(1).scaleb(-decimals), rounding=rounding, context=_EXACT_CONTEXT):f}"
    return text.removeprefix("-") if Decimal(text) == 0 else text


def decimal_places(text: str) -> int:
    """Digits behind the point."""
    return len(text.partition(".")[2])
