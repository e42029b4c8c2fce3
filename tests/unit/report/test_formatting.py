"""Number formatting: a shown interval contains the true one, and contains zero only if the true one does."""

from __future__ import annotations

import math
import random

import pytest

from peftbench.record import Interval
from peftbench.report.text.formatting import decimal_places, format_decimal, round_outward


@pytest.mark.parametrize(
    ("low", "high", "digits", "shown"),
    [
        (-0.31, 2.81, 1, ("-0.4", "2.9")),
        (3.19, 9.31, 1, ("3.1", "9.4")),
        (-9.31, -3.19, 1, ("-9.4", "-3.1")),
        (0.03125, 0.4375, 1, ("0.03", "0.44")),
        (-0.4375, -(2**-11), 3, ("-0.4375", "-0.0004")),
        (-0.0001, 1e-12, 1, ("-0.1", "0.1")),
        (0.0, 0.0, 1, ("0.0", "0.0")),
        (2.0, 2.0, 1, ("2.0", "2.0")),
        (-1e300, 1e300, 1, (f"-{int(1e300)}.0", f"{int(1e300)}.0")),
    ],
)
def test_round_outward_matches_known_intervals(low: float, high: float, digits: int, shown: tuple[str, str]) -> None:
    """Round both ends away from the mean, with more digits only if an end would become zero."""
    assert round_outward(Interval(mean=(low + high) / 2, low=low, high=high), digits) == shown


def test_round_outward_contains_any_interval() -> None:
    """Check that the shown interval contains the true one, and excludes zero if and only if the true one does."""
    generator = random.Random(0)  # noqa: S311 (not for cryptography)
    for _ in range(2000):
        low = generator.choice((-1, 1)) * 10 ** generator.uniform(-8, 6)
        high = low + 10 ** generator.uniform(-8, 6)
        shown_low, shown_high = map(
            float, round_outward(Interval(mean=low, low=low, high=high), generator.randrange(4))
        )
        assert shown_low <= low <= high <= shown_high
        assert (shown_low > 0 or shown_high < 0) == (low > 0 or high < 0)


def test_rounded_zero_has_no_sign() -> None:
    """Format a small negative number as zero."""
    assert format_decimal(-0.04, 1) == "0.0"
    assert format_decimal(-math.pi, 3) == "-3.142"
    assert (decimal_places("0.034"), decimal_places("7")) == (3, 0)
