"""Tolerances between a run of two processes and one of one process: about three times the largest measured difference.

``test_tolerances_catch_a_lost_process`` checks that each tolerance is small enough to detect that half of the gradients
are missing.
"""

from __future__ import annotations

from peftbench.distributed.compatibility import Combination

_FP32 = 1e-5
"""Relative difference: float32 sums have another order."""
_BF16 = 2e-3
"""Relative difference: micro-batches of another shape round differently to the 8 significant bits of bf16."""
_ORTHOGONAL = 6e-5
"""Relative difference: Muon orthogonalizes updates in bf16."""
_8BIT = 1e-4
"""Relative difference: ZeRO has other block boundaries in the flat vector, and each block has its own scale."""


def tolerance(combination: Combination) -> float:
    """Return the largest relative difference of a training or held-out loss."""
    if combination.precision == "bf16":
        return _BF16
    if combination.optimizer == "muon":
        return _ORTHOGONAL
    return _8BIT if "8bit" in combination.optimizer else _FP32


def resume_tolerance(combination: Combination) -> float:
    """Return the largest relative difference between a resumed run of two processes and an uninterrupted one.

    Sums in another order change the last digit; GaLore's singular value decomposition amplifies that.
    """
    return 1e-4 if combination.optimizer == "galore" else 1e-6


def resume_tolerance_single(combination: Combination) -> float:
    """Return the same for one process: zero, because the resumed run must be bit-identical.

    GaLore is an exception. On some processors the last digit of a singular value decomposition depends on the address
    of its matrix. The largest measured differences were 1.0e-6 of the weights and 1.4e-7 of a loss, without AVX-512.
    """
    return 3e-6 if combination.optimizer == "galore" else 0.0


def weight_tolerance(combination: Combination) -> float:
    """Return the largest distance between weights, relative to their distance from the untrained model."""
    if combination.optimizer == "lion8bit":
        return 0.15  # the update is the sign of an 8-bit value
    return 0.05 if combination.precision == "bf16" or "8bit" in combination.optimizer else 0.002
