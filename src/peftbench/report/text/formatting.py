"""Methods by their kind, and lists in words."""

from __future__ import annotations

from collections.abc import Sequence

from peftbench.record import RunRecord

MAX_LISTED_LABELS = 4
"""Labels in a sentence, before the others are counted."""


def method_kind(record: RunRecord) -> str:
    """The method's kind."""
    return str(record.recipe["method"]["kind"])


def join_with_and(words: Sequence[str], joint: str = "") -> str:
    """``a, b and c``; a ``joint`` stands before each but the first."""
    rest = [f"{joint}{word}" for word in words[1:]]
    return " and ".join([", ".join([*words[:1], *rest[:-1]]), rest[-1]]) if rest else words[0]


def truncate_list(labels: Sequence[str]) -> list[str]:
    """The first ``NAMED`` of ``labels``, and how many more there are."""
    return [*labels[:MAX_LISTED_LABELS], *([f"{len(labels) - MAX_LISTED_LABELS} more"] if len(labels) > MAX_LISTED_LABELS else [])]
