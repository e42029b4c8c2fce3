"""Parse and format memory sizes, and format durations."""

from __future__ import annotations

import math
import re

from pydantic import ByteSize, TypeAdapter, ValidationError

from peftbench.errors import BudgetError

_BYTE_SIZE_ADAPTER = TypeAdapter(ByteSize)
_SIZE_PATTERN = re.compile(r"\s*[0-9]+(\.[0-9]+)?\s*([kmgtp]?i?b)?\s*", re.IGNORECASE | re.ASCII)
"""The whole text must match: pydantic reads "16,384MiB" as 16 bytes."""
_EXAMPLE = "write e.g. 16GiB or 15500MiB"
_MAX_QUOTED = 40
_MIB, _GIB = 2**20, 2**30


def parse_size(text: str) -> int:
    """Return the bytes of "16GiB", "16GB" (10^9), "15.5 GiB" or a plain number of bytes.

    Raises:
        BudgetError: ``text`` is not a size, or it is zero.
    """
    quoted = repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")
    if not _SIZE_PATTERN.fullmatch(text):
        raise BudgetError(f"{quoted} is not a memory size; {_EXAMPLE}")
    try:
        size = int(_BYTE_SIZE_ADAPTER.validate_python(text))
    except (ValidationError, ArithmeticError) as error:  # larger than a float can be
        raise BudgetError(f"{quoted} is not a memory size; {_EXAMPLE}") from error
    if size <= 0:
        raise BudgetError(f"a memory budget must be more than 0, not {quoted}; {_EXAMPLE}")
    return size


def format_bytes(num_bytes: int, total_bytes: int | None = None) -> str:
    """Format a size for a person, with the total if given: "96 of 112 MiB"; from 10 GiB "13.1 of 16.0 GiB".

    Sizes below 1 MiB are in KiB, rounded up, so that only nothing is zero.
    """
    sizes = [num_bytes] if total_bytes is None else [num_bytes, total_bytes]
    if max(sizes) < _MIB:
        return " of ".join(f"{math.ceil(size / 1024):,}" for size in sizes) + " KiB"
    if max(sizes) < 10 * _GIB:
        return " of ".join(f"{size / _MIB:,.0f}" for size in sizes) + " MiB"
    return " of ".join(f"{size / _GIB:,.1f}" for size in sizes) + " GiB"


def format_duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, e.g. 1:05:09."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
