"""RecordedPlan: the memory that was predicted for the rows of a run, next to what it measured."""

from __future__ import annotations

from peftbench.common.schema import RecordModel


class PlannedMemory(RecordModel):
    """Predicted memory of the training on rank 0, for rows of one size that fill the largest micro-batch of the run."""

    device_profile: str
    """Name of the device profile: torch's name of a GPU, ``a GPU`` for one without a profile, or ``CPU``."""
    step: int | None
    """Step whose rows were planned: on CPU the one of the memory breakdown. None: the largest rows of all steps."""
    micro_batch_size: int
    """Rows of the planned micro-batches."""
    sequence_length: int
    """Real tokens of each planned row."""
    labeled_tokens: int | None
    """Labeled tokens of each planned row, as in the run; None if unknown: as many as an estimate assumes."""
    measured_positions: int
    """Positions of the largest micro-batch of these steps, padding included: the most rows times the longest row."""
    peak_phase: str
    """Part of the step with the peak: forward, backward or optimizer; DeepSpeed merges the last two."""
    live_bytes: int
    """Peak bytes of live tensors."""
    allocated_bytes: int
    """Peak bytes that the allocator gives out for them."""
    reserved_bytes: int
    """Bytes that the allocator reserves from the driver."""
    process_bytes: tuple[int, int]
    """Reserved bytes, context and workspaces: minimum and maximum. On CPU without Python and its libraries."""


class RecordedPlan(RecordModel):
    """The plan of a run that trained to its end, or the reason why it has none."""

    predicted: PlannedMemory | None = None
    reason: str | None = None
    """The reason for which the memory of this run cannot be predicted; None if it was."""
