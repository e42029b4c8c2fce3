"""Measure the time of the Probe's calls alone, relative to the median step of given records.

Run: python benchmarks/probe_overhead/overhead.py docs/results/demo
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from tabulate import tabulate

from peftbench.profiler.energy import build_energy_meter
from peftbench.profiler.memory import MemoryMeter
from peftbench.profiler.probe import Probe
from peftbench.record import Memory, read_records

CALLS = 10_000
REPEATS = 7
PARTS = ("forward", "backward", "optimizer")


class FakeMeter:
    """A meter that is read at every part of a step, as on a GPU, and returns constants."""

    supports_step_parts = True
    cuda_context_bytes: int | None = None

    def lap(self, *, within_steps: bool = False) -> Memory:
        """Return what CudaMeter builds from the allocator's counters."""
        return Memory(allocated_bytes=1, reserved_bytes=2, inactive_split_bytes=3, num_alloc_retries=0)

    def read_in_use_bytes(self) -> int | None:
        """Return None: only the progress bar calls it, which is not timed here."""
        return None

    def read_process_bytes(self) -> int | None:
        """Return None: called at the end of a phase, which is not timed here."""
        return None

    def set_baseline(self) -> None:
        """Do nothing: there is no earlier memory."""

    def empty_cache(self) -> None:
        """Do nothing: called at the start of a phase."""


def measure_step_seconds(device: torch.device, meter: MemoryMeter | None = None) -> list[float]:
    """Return, per repeat, the Probe's seconds in one timed step with one micro-batch and in the pause after it."""
    seconds = []
    for _ in range(REPEATS):
        probe = Probe(device, build_energy_meter(device))
        probe.memory_meter = meter or probe.memory_meter
        with probe.training(untimed_steps=0):
            start = time.perf_counter()
            for _ in range(CALLS):
                with probe.step():
                    for part in PARTS:
                        with probe.part(part):
                            pass
                with probe.paused():
                    pass
            seconds.append((time.perf_counter() - start) / CALLS)
    return seconds


def measure_phase_seconds(device: torch.device) -> list[float]:
    """Return, per repeat, the seconds to enter and leave a phase, including reset and reading of its peak."""
    seconds = []
    for _ in range(REPEATS):
        probe = Probe(device)
        start = time.perf_counter()
        for _ in range(100):
            with probe.phase("train"):
                pass
        seconds.append((time.perf_counter() - start) / 100)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, help="Folder with records of runs on this kind of machine.")
    folder = parser.parse_args().records
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, phase = statistics.median(measure_step_seconds(device)), statistics.median(measure_phase_seconds(device))
    print(f"on {device}: {step * 1e6:.2f} us a step, {phase * 1e6:.0f} us a phase (medians of {REPEATS})")
    parts = statistics.median(measure_step_seconds(device, FakeMeter()))
    print(f"with a peak for every part, the reading itself left out: {parts * 1e6:.2f} us a step\n")
    rows = [
        {
            "run": record.name,
            "median step, ms": f"{statistics.median(record.step_seconds) * 1e3:.1f}",
            "Probe, of a step": f"{step / statistics.median(record.step_seconds):.5%}",
        }
        for record in read_records(folder)
        if record.step_seconds
    ]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
