"""Formatting of byte counts and durations."""

from __future__ import annotations

import pytest

from peftbench.common.units import format_bytes, format_duration

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("num_bytes", "total_bytes", "text"),
    [
        (96 * MIB, 112 * MIB, "96 of 112 MiB"),
        (96 * MIB, None, "96 MiB"),
        (0, 112 * MIB, "0 of 112 MiB"),
        (8 * GIB - MIB, 8 * GIB, "8,191 of 8,192 MiB"),
        (int(13.14 * GIB), 16 * GIB, "13.1 of 16.0 GiB"),
        (200 * MIB, 80 * GIB, "0.2 of 80.0 GiB"),
        (12 * GIB, None, "12.0 GiB"),
    ],
)
def test_format_bytes_uses_one_unit(num_bytes: int, total_bytes: int | None, text: str) -> None:
    """Check that the larger size selects the unit: MiB below 10 GiB, else GiB."""
    assert format_bytes(num_bytes, total_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3_909, "1:05:09")])
def test_format_duration(seconds: float, text: str) -> None:
    """Seconds are rounded first, so that 60 seconds are a minute."""
    assert format_duration(seconds) == text
