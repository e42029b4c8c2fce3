"""RunRecord: the only file a report reads. Imports no torch.

Sizes are in bytes, times in seconds. An unknown value is None, never a guess.
"""

from peftbench.record.measurements import (
    Compute,
    CountedStep,
    Device,
    Engine,
    Flops,
    Memory,
    MemoryBreakdown,
    ParameterCounts,
    StateBytes,
    Throughput,
    Tokens,
    TokensPerSecond,
)
from peftbench.record.quality import Interval, PerExample, Quality, Sample
from peftbench.record.run_record import (
    EXIT_CODES,
    FINAL_OUTCOMES,
    RECORD_FILE,
    SCHEMA_VERSION,
    Outcome,
    OutcomeKind,
    RecordScan,
    RunRecord,
    find_records,
    read_record,
    read_records,
    read_schema_version,
    scan_records,
    train_peak_bytes,
)

__all__ = [
    "EXIT_CODES",
    "FINAL_OUTCOMES",
    "RECORD_FILE",
    "SCHEMA_VERSION",
    "Compute",
    "CountedStep",
    "Device",
    "Engine",
    "Flops",
    "Interval",
    "Memory",
    "MemoryBreakdown",
    "Outcome",
    "OutcomeKind",
    "ParameterCounts",
    "PerExample",
    "Quality",
    "RecordScan",
    "RunRecord",
    "Sample",
    "StateBytes",
    "Throughput",
    "Tokens",
    "TokensPerSecond",
    "find_records",
    "read_record",
    "read_records",
    "read_schema_version",
    "scan_records",
    "train_peak_bytes",
]
