"""Sizes of memory as people write them."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from peftbench.errors import BudgetError

_SIZE = TypeAdapter(ByteSize)


def parse_size(text: str) -> int:
    """Bytes of "16GiB", "16GB" (10^9), "15.5 GiB" or a plain number of bytes.

    Raises:
        BudgetError: it is no size, or none at all.
    """
    try:
        size = int(_SIZE.validate_python(text))
    except ValidationError as error:
        raise BudgetError(f"{text!r} is no size of memory; write it as 16GiB or 15500MiB") from error
    if size <= 0:
        raise BudgetError(f"a budget of {text!r} leaves no memory at all; write it as 16GiB or 15500MiB")
    return size
