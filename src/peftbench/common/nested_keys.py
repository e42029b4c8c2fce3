"""Nested mappings as dotted keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class _Missing:
    """The value of a key that a mapping lacks."""

    def __str__(self) -> str:
        return "–"


MISSING = _Missing()


def flatten_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) for nested mappings, keys prefixed with ``prefix``; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def list_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    """Return (dotted key, first value, second value) of every key whose values differ, or that one of them lacks."""
    one, other = dict(flatten_keys(first)), dict(flatten_keys(second))
    pairs = {key: (one.get(key, MISSING), other.get(key, MISSING)) for key in one | other}
    return [
        (key, before, after)
        for key, (before, after) in pairs.items()
        if before != after or type(before) is not type(after)
    ]
