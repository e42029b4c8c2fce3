"""States, losses and seconds of optimizers side by side, from the records of a suite, against its first run.

Run: python benchmarks/eight_bit/table.py benchmarks/eight_bit/records
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from tabulate import tabulate

from peftbench.record import RunRecord, read_records

SHOWN = (1, 5, 10, 20)
"""Steps whose losses are shown."""


def row(record: RunRecord, first: RunRecord) -> dict[str, str]:
    """What one run kept and took, and of how much of the first one's that is."""
    assert record.state_bytes is not None
    assert first.state_bytes is not None
    states, reference = record.state_bytes.optimizer, first.state_bytes.optimizer
    seconds, usual = (statistics.median(found.step_seconds) for found in (record, first))
    apart = max(abs(mine / its - 1) for mine, its in zip(record.step_losses, first.step_losses, strict=True))
    return {
        "optimizer": record.name,
        "states, bytes": f"{states:,}",
        "in closed form": f"{record.state_bytes.expected_optimizer:,}",
        "smaller": f"{reference / states:.2f}x",
        **{f"loss {step}": f"{record.step_losses[step - 1]:.4f}" for step in SHOWN if step <= len(record.step_losses)},
        "loss apart, at most": f"{apart:.4%}",
        "median step": f"{seconds:.2f} s",
        "time": f"{seconds / usual:.2f}x",
    }


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, help="Folder of a suite's records.")
    parser.add_argument("--first", default="adamw", help="Name of the run that others are held against.")
    given = parser.parse_args()
    records = sorted(read_records(given.records), key=lambda record: record.started_at)
    first = next(record for record in records if record.name == given.first)
    rows = [row(record, first) for record in records if record.step_seconds]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
