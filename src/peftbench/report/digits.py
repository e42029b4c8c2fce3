"""Figures as text that says no more than they do."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

from peftbench.record import Interval

_MAX_DECIMALS = 9
"""Behind the point: a bound nearer to zero than that is shown as zero."""

_EXACT_CONTEXT = Context(prec=400)
"""Digits that hold any float."""


def round_outward(interval: Interval, digits: int) -> tuple[str, str]:
    """Both ends, rounded away from the mean to ``digits`` behind the point, or to more.

    A shown interval holds what the true one does. One that excludes zero must not be shown as one that reaches it, so
    that then there are as many digits as it takes.
    """
    while digits < _MAX_DECIMALS:
        low, high = format_decimal(interval.low, digits, ROUND_FLOOR), format_decimal(interval.high, digits, ROUND_CEILING)
        if interval.low <= 0 <= interval.high or (Decimal(low) > 0) or (Decimal(high) < 0):
            break
        digits += 1
    return format_decimal(interval.low, digits, ROUND_FLOOR), format_decimal(interval.high, digits, ROUND_CEILING)


def format_decimal(value: float, digits: int, how: str = ROUND_HALF_EVEN) -> str:
    """``value`` to ``digits`` behind the point; zero has no sign."""
    text = f"{Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=how, context=_EXACT_CONTEXT):f}"
    return text.removeprefix("-") if Decimal(text) == 0 else text


def decimal_places(text: str) -> int:
    """Digits behind the point."""
    return len(text.partition(".")[2])
