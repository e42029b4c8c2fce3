"""Figures as text that says no more than they do."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

from peftbench.record import Interval

_MOST_DIGITS = 9
"""Behind the point: a bound nearer to zero than that is shown as zero."""

_EXACT = Context(prec=400)
"""Digits that hold any float."""


def outward(interval: Interval, digits: int) -> tuple[str, str]:
    """Both ends, rounded away from the mean to ``digits`` behind the point, or to more.

    A shown interval holds what the true one does. One that excludes zero must not be shown as one that reaches it, so
    that then there are as many digits as it takes.
    """
    while digits < _MOST_DIGITS:
        low, high = rounded(interval.low, digits, ROUND_FLOOR), rounded(interval.high, digits, ROUND_CEILING)
        if interval.low <= 0 <= interval.high or (Decimal(low) > 0) or (Decimal(high) < 0):
            break
        digits += 1
    return rounded(interval.low, digits, ROUND_FLOOR), rounded(interval.high, digits, ROUND_CEILING)


def rounded(value: float, digits: int, how: str = ROUND_HALF_EVEN) -> str:
    """``value`` to ``digits`` behind the point; zero has no sign."""
    text = f"{Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=how, context=_EXACT):f}"
    return text.removeprefix("-") if Decimal(text) == 0 else text


def places(text: str) -> int:
    """Digits behind the point."""
    return len(text.partition(".")[2])
