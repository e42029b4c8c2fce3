"""Operations that stand for several equal ones: counters of operations and FLOPs count them several times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_repetitions = [1]


@contextmanager
def repeat_counts(times: int) -> Iterator[None]:
    """Count each operation within the context ``times`` times."""
    _repetitions.append(_repetitions[-1] * times)
    try:
        yield
    finally:
        _repetitions.pop()


def get_repetitions() -> int:
    """Return how many times the running operation counts."""
    return _repetitions[-1]
