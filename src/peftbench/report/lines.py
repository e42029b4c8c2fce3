"""Names of runs on one line, and lists in words."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 4
"""Labels in a sentence, before the others are counted."""


def on_a_line(text: str) -> str:
    """``text`` without anything that is not printed, and with single spaces."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def listed(words: Sequence[str], joint: str = "") -> str:
    """``a, b and c``; a ``joint`` stands before each but the first."""
    rest = [f"{joint}{word}" for word in words[1:]]
    return " and ".join([", ".join([*words[:1], *rest[:-1]]), rest[-1]]) if rest else words[0]


def few(labels: Sequence[str]) -> list[str]:
    """The first ``NAMED`` of ``labels``, and how many more there are."""
    return [*labels[:NAMED], *([f"{len(labels) - NAMED} more"] if len(labels) > NAMED else [])]
