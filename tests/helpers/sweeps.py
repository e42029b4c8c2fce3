"""Marks for sweeps: chosen points and a random sample (with a seed) are fast; the others are slow."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


def mark_slow(points: Sequence[Any], keep: Callable[[Any], bool], seed: int, one_in: int = 10) -> list[Any]:
    """Mark a sweep's points as slow, except those that ``keep`` selects and, seeded, one in ``one_in``."""
    fast = set(random.Random(seed).sample(range(len(points)), len(points) // one_in))  # noqa: S311
    return [
        pytest.param(*point, marks=() if index in fast or keep(point) else pytest.mark.slow)
        for index, point in enumerate(points)
    ]


def mark_others_slow(values: Mapping[str, Any], *fast: str) -> list[Any]:
    """Return one parameter for each item of ``values``; those not named in ``fast`` are slow.

    Raises:
        ValueError: a name in ``fast`` is not in ``values``.
    """
    if unknown := set(fast) - set(values):
        raise ValueError(f"unknown names {sorted(unknown)}")
    return [
        pytest.param(value, id=name, marks=() if name in fast else pytest.mark.slow) for name, value in values.items()
    ]
