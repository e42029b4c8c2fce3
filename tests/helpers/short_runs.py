"""Shorten what a run does besides the training, in processes that execute many runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

_PEAK_FLOPS = "peftbench.profiler.peak_flops"


@contextmanager
def use_small_matmul() -> Iterator[None]:
    """Measure the device's FLOP/s after a run with one matrix product of 32 x 32."""
    with patch(f"{_PEAK_FLOPS}._MATRIX_SIZES", {"cpu": 32}), patch(f"{_PEAK_FLOPS}._MEASUREMENT_SECONDS", 0.0):
        yield


@cache
def freeze_imported_objects() -> None:
    """Exclude the objects of all imported libraries, about a million, from each later garbage collection."""
    gc.collect()
    gc.freeze()
