"""What the Probe itself takes of a step: its calls alone, many times, against the median step of given records.

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


class StandIn:
    """A meter that reads at every part as a GPU's does, and finds always the same."""

    supports_step_parts = True
    cuda_context_bytes: int | None = None

    def lap(self) -> Memory:
        """What CudaMeter makes of the allocator's counters."""
        return Memory(allocated_bytes=1, reserved_bytes=2, inactive_split_bytes=3, num_alloc_retries=0)

    def read_in_use_bytes(self) -> int | None:
        """Asked where somebody watches, which is not timed here."""
        return None

    def read_process_bytes(self) -> int | None:
        """Asked at the end of a phase, which is not timed here."""
        return None

    def set_baseline(self) -> None:
        """Nothing was held before."""

    def empty_cache(self) -> None:
        """Asked at the start of a phase."""


def seconds_a_step(device: torch.device, meter: MemoryMeter | None = None) -> list[float]:
    """Seconds that one timed step of one micro-batch and the pause after it spend in the Probe, once a repeat."""
    found = []
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
            found.append((time.perf_counter() - start) / CALLS)
    return found


def seconds_a_phase(device: torch.device) -> list[float]:
    """Seconds that entering and leaving one phase takes, with the reset and the reading of its peak."""
    found = []
    for _ in range(REPEATS):
        probe = Probe(device)
        start = time.perf_counter()
        for _ in range(100):
            with probe.phase("train"):
                pass
        found.append((time.perf_counter() - start) / 100)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, help="Folder with records of runs on this kind of machine.")
    folder = parser.parse_args().records
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, phase = statistics.median(seconds_a_step(device)), statistics.median(seconds_a_phase(device))
    print(f"on {device}: {step * 1e6:.2f} us a step, {phase * 1e6:.0f} us a phase (medians of {REPEATS})")
    parts = statistics.median(seconds_a_step(device, StandIn()))
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
