"""Faults of JSON text in plain English."""

from __future__ import annotations

import json

JSON_SPACES = " \t\r\n"
_SHOWN_CHARACTERS = 20
_CORRECT = "correct that line"
_ONE_PER_LINE = "write each object on one line"


def describe_json_fault(text: str, error: json.JSONDecodeError) -> tuple[str, str]:
    """Return what is wrong with JSON text, as a clause that follows "line N", and what to do."""
    message, where = error.msg, f"(character {error.colno})"
    rest, before = text[error.pos :].rstrip(JSON_SPACES), text[: error.pos].rstrip(JSON_SPACES)
    first = rest[:1]
    is_second_value, is_in_string = message == "Extra data", message.startswith("Invalid control character")
    is_cut = not text.endswith(("\n", "\r"))
    # In this order: the first that applies is returned.
    faults = [
        (is_second_value and first == "{", f"has a second object {where}", _ONE_PER_LINE),
        (first == "\0", f"has a NUL byte {where}", _CORRECT),
        (is_second_value, f"has {_quote(rest)} after its object {where}", _CORRECT),
        (message.startswith("Unterminated string"), f"has a string without its closing quote {where}", _CORRECT),
        (message.startswith("Invalid \\"), f"has an invalid escape in a string {where}", "write a backslash twice"),
        (
            is_in_string and text[error.pos : error.pos + 1] in ("\r", "\n"),
            f"has a string that is not closed at the end of the line {where}",
            _CORRECT,
        ),
        (not rest and is_cut, "ends before its object is complete, and the file may be cut off", _ONE_PER_LINE),
        (not rest, "ends before its object is complete", _ONE_PER_LINE),
        (first < " ", f"has a raw control character {where}", f"write it as {json.dumps(first)[1:-1]}"),
        (first == "'", f"has a single quote where JSON needs a double quote {where}", _CORRECT),
        (first == "," or _is_trailing_comma(before, first, message), f"has an extra comma {where}", _CORRECT),
        (
            message == "Expecting ',' delimiter",
            f"lacks a comma or a closing bracket before {_quote(rest)} {where}",
            _CORRECT,
        ),
        (message == "Expecting ':' delimiter", f"lacks a colon before {_quote(rest)} {where}", _CORRECT),
        (
            message.startswith("Expecting property name"),
            f"has {_quote(rest)} where a name in double quotes is expected {where}",
            _CORRECT,
        ),
        (True, f"has {_quote(rest)} where a value is expected {where}", _CORRECT),
    ]
    return next((fault, advice) for applies, fault, advice in faults if applies)


def _is_trailing_comma(before: str, first: str, message: str) -> bool:
    """True if a comma precedes a closing bracket; since Python 3.13 its position is that of the comma."""
    return (before.endswith(",") and first in "}]") or message.startswith("Illegal trailing comma")


def _quote(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
