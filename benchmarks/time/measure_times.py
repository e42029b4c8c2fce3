"""Measure the step time of every strategy with real runs, one process after another; needs a quiet machine.

Run: OMP_NUM_THREADS=1 python benchmarks/time/measure_times.py benchmarks/time/records/measurements.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timed_strategies import SETTINGS, UNTIMED_STEPS, build_recipe

from peftbench.common.filesystem import write_atomically
from peftbench.common.libraries import quiet_libraries
from peftbench.run.runner import Run
from peftbench.training.callbacks import StepInfo


class CpuClock:
    """Reads the process's CPU time after each step, which other processes on the machine affect less."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def after_step(self, _info: StepInfo) -> None:
        """Read the clock."""
        self.readings.append(time.process_time())


def measure(name: str) -> dict[str, Any]:
    """Run one strategy in this process."""
    quiet_libraries()
    clock = CpuClock()
    with tempfile.TemporaryDirectory() as folder:
        record, _ = Run(build_recipe(name, folder), step_callbacks=[clock]).execute()
    if record.throughput is None or record.tokens is None or record.device is None or record.engine is None:
        raise SystemExit(f"{name}: {record.outcome.kind}: {record.outcome.error}")
    steps = [end - start for start, end in zip(clock.readings, clock.readings[1:], strict=False)]
    return {
        "seconds": record.throughput.step_seconds_median,
        "seconds_p10": record.throughput.step_seconds_p10,
        "seconds_p90": record.throughput.step_seconds_p90,
        "cpu_seconds": statistics.median(steps[UNTIMED_STEPS - 1 :]),
        "padded_tokens": record.tokens.padded,
        "labeled_tokens": record.tokens.labeled,
        "device": record.device.name,
        "threads": record.engine.num_threads,
        "torch": record.library_versions["torch"],
    }


def main() -> None:
    """Measure one strategy and print it as JSON, or all in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="File to write.")
    parser.add_argument("--only", choices=SETTINGS, help="Measure this strategy in this process and print it.")
    args = parser.parse_args()
    if args.only:
        measured = measure(args.only)
        print(json.dumps(measured))
        return
    if args.out is None:
        parser.error("give the file to write")
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results = {}
    for name in SETTINGS:
        command = [sys.executable, __file__, "--only", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {results[name]['seconds']:.4f} s", flush=True)
    write_atomically(args.out, json.dumps({"started_at": started_at, "strategies": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
