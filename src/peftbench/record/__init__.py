"""RunRecord: what is kept of a run, and the only thing a report is made from. Needs no torch.

Sizes are bytes and times seconds. What is not known is None, never a guess.
"""

from peftbench.record.measured import (
    Breakdown,
    Compute,
    CountedStep,
    Device,
    Engine,
    Flops,
    Memory,
    Parameters,
    StateBytes,
    Throughput,
    Tokens,
    TokensPerSecond,
)
from peftbench.record.quality import ByExample, Interval, Quality, Sample
from peftbench.record.run import (
    EXIT_CODES,
    FILE,
    FINAL,
    SCHEMA_VERSION,
    Outcome,
    OutcomeKind,
    RunRecord,
    find_records,
    read_record,
    read_records,
    read_records_by_path,
    train_peak_bytes,
)

__all__ = [
    "EXIT_CODES",
    "FILE",
    "FINAL",
    "SCHEMA_VERSION",
    "Breakdown",
    "ByExample",
    "Compute",
    "CountedStep",
    "Device",
    "Engine",
    "Flops",
    "Interval",
    "Memory",
    "Outcome",
    "OutcomeKind",
    "Parameters",
    "Quality",
    "RunRecord",
    "Sample",
    "StateBytes",
    "Throughput",
    "Tokens",
    "TokensPerSecond",
    "find_records",
    "read_record",
    "read_records",
    "read_records_by_path",
    "train_peak_bytes",
]
