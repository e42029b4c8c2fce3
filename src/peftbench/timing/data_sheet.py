"""Speeds of a GPU that was not measured: its data sheet, and the fractions of it that programs reach."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftbench.profiler.peak_flops import get_peak_flops
from peftbench.timing.operations import Operation
from peftbench.timing.speeds import MissingSpeedError, SecondsRange

PRODUCT_EFFICIENCY = (0.35, 0.85)
"""Fraction of the peak FLOP/s that large matrix products reach."""
ATTENTION_EFFICIENCY = (0.15, 0.6)
"""Share of the peak FLOP/s that fused attention kernels reach."""
BANDWIDTH_EFFICIENCY = (0.5, 0.9)
"""Share of the memory bandwidth that operations reach."""
LAUNCH_SECONDS = (4e-6, 20e-6)
"""Seconds in which Python, autograd and the driver dispatch one operation."""
LINK_BYTES_PER_SECOND = (8e9, 300e9)
"""Bytes per second that one process sends: PCIe 3.0 without peer access to NVLink of Hopper."""


@dataclass(frozen=True)
class DataSheetSpeeds:
    """Ranges of time from the peak FLOP/s and the memory bandwidth of a data sheet."""

    torch_name: str
    bytes_per_second: float
    overlaps_launches: bool = True
    launch_seconds: SecondsRange = LAUNCH_SECONDS
    basis: str = field(default="from the data sheet, not measured")

    def estimate_operation(self, operation: Operation) -> SecondsRange:
        """Return the longer time of arithmetic and memory: minimum and maximum.

        Raises:
            MissingSpeedError: the data sheet has no FLOP/s for the type of a product.
        """
        if operation.kind == "exchange":
            return operation.nbytes / LINK_BYTES_PER_SECOND[1], operation.nbytes / LINK_BYTES_PER_SECOND[0]
        slow, fast = (operation.nbytes / (self.bytes_per_second * share) for share in BANDWIDTH_EFFICIENCY)
        if not operation.flops:
            return fast, slow
        peak = get_peak_flops(self.torch_name, operation.dtype)
        if peak is None:
            raise MissingSpeedError(f"the peak FLOP/s of {self.torch_name} in {operation.dtype} is unknown")
        efficiency = ATTENTION_EFFICIENCY if operation.kind == "attention" else PRODUCT_EFFICIENCY
        longest, shortest = (operation.flops / (peak * share) for share in efficiency)
        return max(fast, shortest), max(slow, longest)
