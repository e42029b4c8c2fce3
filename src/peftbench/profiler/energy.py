"""Energy of what a run is on: of the GPU's board by NVML, of the processors by RAPL, None where neither tells."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from peftbench.profiler.nvml import Gpu

POWERCAP_DIR = Path("/sys/class/powercap")
"""Where Linux shows RAPL's counters (its powercap documentation); only root may read them on many systems."""
_POLL_SECONDS = 60.0


class EnergyMeter(Protocol):
    """Counts energy from when it was made."""

    def read_joules(self) -> float | None:
        """So far."""

    def poll(self) -> None:
        """Look at counters that would run over unseen."""


@dataclass
class GpuEnergy:
    """Of one GPU's board."""

    gpu: Gpu

    def read_joules(self) -> float | None:
        return self.gpu.read_joules()

    def poll(self) -> None:
        """The counter has 64 bits."""


@dataclass
class _RaplPackage:
    """One processor's counter, in microjoules, which starts anew at its range."""

    counter_path: Path
    range_microjoules: int
    last_microjoules: int

    @classmethod
    def from_dir(cls, directory: Path) -> _RaplPackage:
        energy = directory / "energy_uj"
        return cls(energy, int((directory / "max_energy_range_uj").read_text()), int(energy.read_text()))

    def read_delta(self) -> int:
        """Microjoules since this was last asked, right as long as the counter ran over once at most."""
        before, self.last_microjoules = self.last_microjoules, int(self.counter_path.read_text())
        return (self.last_microjoules - before) % (self.range_microjoules + 1)


@dataclass
class CpuEnergy:
    """Of all processors of this machine, whatever else runs on them."""

    packages: list[_RaplPackage]
    _microjoules: int | None = 0
    """None once a counter could not be read: what it counted meanwhile is lost."""
    _last_read_time: float = field(default_factory=time.monotonic)

    def read_joules(self) -> float | None:
        self._last_read_time = time.monotonic()
        if self._microjoules is None:
            return None
        try:
            self._microjoules += sum(package.read_delta() for package in self.packages)
        except (OSError, ValueError):
            self._microjoules = None
            return None
        return self._microjoules / 1e6

    def poll(self) -> None:
        """At 250 W a counter of usual range runs over after a quarter of an hour."""
        if time.monotonic() - self._last_read_time > _POLL_SECONDS:
            self.read_joules()


@dataclass(frozen=True)
class NoEnergy:
    """Where nothing tells, or where another process of this machine counts for all."""

    constant_joules: float | None = None

    def read_joules(self) -> float | None:
        return self.constant_joules

    def poll(self) -> None:
        """Nothing to look at."""


def build_energy_meter(
    device: torch.device, *, reads_cpu_counters: bool = True, powercap_dir: Path = POWERCAP_DIR
) -> EnergyMeter:
    """The meter of what ``device`` is.

    Processors are shared: only one process of a machine ``counts`` them, and the others say 0.
    """
    if device.type == "cuda":
        gpu = Gpu.from_device(device)
        return GpuEnergy(gpu) if gpu else NoEnergy()
    try:
        # intel-rapl:0 is a processor, AMD's too; intel-rapl:0:1 is a part of it, and psys counts it once more.
        folders = [f for f in sorted(powercap_dir.glob("intel-rapl:*")) if f.name.count(":") == 1]
        packages = [_RaplPackage.from_dir(f) for f in folders if (f / "name").read_text().startswith("package")]
    except (OSError, ValueError):
        return NoEnergy()
    if not packages:
        return NoEnergy()
    return CpuEnergy(packages) if reads_cpu_counters else NoEnergy(0.0)
