"""Sizes of memory as people write them."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from peftbench.errors import BudgetError

_BYTE_SIZE_ADAPTER = TypeAdapter(ByteSize)
_MIB, _GIB = 2**20, 2**30


def parse_size(text: str) -> int:
    """Bytes of "16GiB", "16GB" (10^9), "15.5 GiB" or a plain number of bytes.

    Raises:
        BudgetError: it is no size, or none at all.
    """
    try:
        size = int(_BYTE_SIZE_ADAPTER.validate_python(text))
    except ValidationError as error:
        raise BudgetError(f"{text!r} is no size of memory; write it as 16GiB or 15500MiB") from error
    if size <= 0:
        raise BudgetError(f"a budget of {text!r} leaves no memory at all; write it as 16GiB or 15500MiB")
    return size


def format_bytes(num_bytes: int, total_bytes: int | None = None) -> str:
    """Short and for a person, with the whole where there is one: "96 of 112 MiB"; from 10 GiB on "13.1 of 16.0 GiB"."""
    sizes = [num_bytes] if total_bytes is None else [num_bytes, total_bytes]
    if max(sizes) < 10 * _GIB:
        return " of ".join(f"{size / _MIB:,.0f}" for size in sizes) + " MiB"
    return " of ".join(f"{size / _GIB:,.1f}" for size in sizes) + " GiB"
