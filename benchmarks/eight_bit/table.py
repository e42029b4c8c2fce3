"""Print states, losses and seconds of optimizers from the records of a suite, relative to its first run.

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


def build_row(record: RunRecord, first: RunRecord) -> dict[str, str]:
    """Return one run's table row, relative to the first run."""
    assert record.state_bytes is not None
    assert first.state_bytes is not None
    states, reference = record.state_bytes.optimizer, first.state_bytes.optimizer
    seconds, first_seconds = (statistics.median(run.step_seconds) for run in (record, first))
    max_difference = max(abs(mine / its - 1) for mine, its in zip(record.step_losses, first.step_losses, strict=True))
    return {
        "optimizer": record.name,
        "states, bytes": f"{states:,}",
        "in closed form": f"{record.state_bytes.expected_optimizer:,}",
        "smaller": f"{reference / states:.2f}x",
        **{f"loss {step}": f"{record.step_losses[step - 1]:.4f}" for step in SHOWN if step <= len(record.step_losses)},
        "loss apart, at most": f"{max_difference:.4%}",
        "median step": f"{seconds:.2f} s",
        "time": f"{seconds / first_seconds:.2f}x",
    }


def main() -> None:
    """Read the records and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, help="Folder of a suite's records.")
    parser.add_argument("--first", default="adamw", help="Name of the run to compare with.")
    args = parser.parse_args()
    records = sorted(read_records(args.records), key=lambda record: record.started_at)
    first = next(record for record in records if record.name == args.first)
    rows = [build_row(record, first) for record in records if record.step_seconds]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
