"""Describe in plain English what a value must be, from an error of pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a group of keys",
    "model": "a group of keys",
    "finite_number": "a finite number",
    "missing": "set",
}
"""Beginning of an error's type: the required kind of value."""
OUT_OF_RANGE_ERRORS = (
    "greater_than",
    "less_than",
    "too_short",
    "too_long",
    "finite_number",
    "value_error",
    "literal_error",
)
"""Beginnings of the types of errors about a value of the right type."""
_COMPARISONS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("greater than", "gt"),
    "less_than": ("less than", "lt"),
}


def describe_requirement(error: Mapping[str, Any]) -> str:
    """Return what the value must be, e.g. "an integer" or "greater than 0"; ``error`` is one of pydantic's errors()."""
    kind, context = str(error["type"]), error.get("ctx", {})
    if kind in _COMPARISONS:
        comparison, key = _COMPARISONS[kind]
        return f"{comparison} {context[key]}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']} values"
    if kind == "too_long":
        return f"a list of at most {context['max_length']} values"
    if kind in {"literal_error", "value_error"}:
        return (
            f"one of {context['expected']}".replace(" or ", ", ") if kind == "literal_error" else str(context["error"])
        )
    return next((name for prefix, name in _NAMES.items() if kind.startswith(prefix)), "another value")
