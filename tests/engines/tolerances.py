"""How far a run of two processes may be from one process, and why."""

from __future__ import annotations

from peftbench.engine.compatibility import Combination

_FP32 = 2e-5
"""Relative: sums of float32 in another order."""
_BF16 = 5e-3
"""Micro-batches of another shape round otherwise to bf16's eight bits."""
_8BIT = 2e-3
"""ZeRO cuts the vector of all values into blocks at other places, and each block has its own scale."""
_SIGN = 5e-3
"""Lion steps by a sign, which a rounding can turn."""


def tolerance(combination: Combination) -> float:
    """Largest relative difference of a training or held-out loss."""
    allowed = _BF16 if combination.precision == "bf16" else _FP32
    if combination.optimizer in {"adamw8bit", "paged_adamw8bit", "lion8bit"}:
        allowed = max(allowed, _8BIT)
    if combination.optimizer.startswith("lion"):
        allowed = max(allowed, _SIGN)
    return allowed


def resumed_apart(combination: Combination) -> float:
    """How far, relatively, two processes that went on may be from those that were not stopped; one is not at all.

    A sum in another order turns the last digit, and a singular value decomposition what hangs on it.
    """
    return 1e-4 if combination.optimizer == "galore" else 1e-6


def moved_apart(combination: Combination) -> float:
    """How far weights may lie apart, of how far they have moved: an untrained model would be 1 apart."""
    if combination.precision == "bf16" or "8bit" in combination.optimizer:
        return 0.15
    return 0.02
