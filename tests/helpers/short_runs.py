"""Shorten what a run does besides the training, in processes that execute many runs."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest.mock import patch


def use_small_matmul() -> AbstractContextManager[Any]:
    """Measure the device's FLOP/s after a run with a matrix product of 32 x 32."""
    return patch("peftbench.profiler.peak_flops._MATRIX_SIZES", {"cpu": 32, "cuda": 32})


@cache
def freeze_imported_objects() -> None:
    """Exclude the objects of all imported libraries, about a million, from each later garbage collection."""
    gc.collect()
    gc.freeze()
