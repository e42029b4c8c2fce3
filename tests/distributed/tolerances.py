"""How far a run of two processes may be from one process, and why: about three times what it was on the machines tried.

``test_tolerances_catch_a_lost_process`` proves that each is small enough to tell when half of the gradients are gone.
"""

from __future__ import annotations

from peftbench.distributed.compatibility import Combination

_FP32 = 1e-5
"""Relative: sums of float32 in another order."""
_BF16 = 2e-3
"""Micro-batches of another shape round otherwise to bf16's eight bits."""
_8BIT = 1e-4
"""ZeRO cuts the vector of all values into blocks at other places, and each block has its own scale."""


def tolerance(combination: Combination) -> float:
    """Largest relative difference of a training or held-out loss."""
    if combination.precision == "bf16":
        return _BF16
    return _8BIT if "8bit" in combination.optimizer else _FP32


def resumed_apart(combination: Combination) -> float:
    """How far, relatively, two processes that went on may be from those that were not stopped.

    A sum in another order turns the last digit, and a singular value decomposition what hangs on it.
    """
    return 1e-4 if combination.optimizer == "galore" else 1e-6


def resumed_alone(combination: Combination) -> float:
    """How far, relatively, one process that went on may be from one that was not stopped: not at all.

    But on some processors the last digit of a singular value decomposition hangs on where its matrix lies in memory;
    5e-9 of the weights and 1.4e-7 of a loss were seen.
    """
    return 5e-7 if combination.optimizer == "galore" else 0.0


def moved_apart(combination: Combination) -> float:
    """How far weights may lie apart, of how far they have moved: an untrained model would be 1 apart."""
    if combination.optimizer == "lion8bit":
        return 0.15  # a sign, of what has eight bits
    return 0.05 if combination.precision == "bf16" or "8bit" in combination.optimizer else 0.002
