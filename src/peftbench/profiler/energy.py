"""Measure the energy of a run's device: the GPU board by NVML, the CPUs by RAPL, None if neither is available."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from peftbench.profiler.nvml import Gpu

POWERCAP_DIR = Path("/sys/class/powercap")
"""Linux's directory of RAPL counters (see its powercap documentation); on many systems only root can read them."""
_POLL_SECONDS = 60.0


class EnergyMeter(Protocol):
    """Counts energy since its creation."""

    def read_joules(self) -> float | None:
        """Return the joules so far, None if unknown."""

    def poll(self) -> None:
        """Read counters that could otherwise wrap unnoticed."""


@dataclass
class GpuEnergy:
    """Energy of one GPU board."""

    gpu: Gpu

    def read_joules(self) -> float | None:
        return self.gpu.read_joules()

    def poll(self) -> None:
        """Do nothing: the counter has 64 bits."""


@dataclass
class _RaplPackage:
    """One CPU package's counter in microjoules, which wraps at its range."""

    counter_path: Path
    range_microjoules: int
    last_microjoules: int

    @classmethod
    def from_dir(cls, directory: Path) -> _RaplPackage:
        energy = directory / "energy_uj"
        return cls(energy, int((directory / "max_energy_range_uj").read_text()), int(energy.read_text()))

    def read_delta(self) -> int:
        """Return the microjoules since the last call; correct if the counter wrapped at most once."""
        before, self.last_microjoules = self.last_microjoules, int(self.counter_path.read_text())
        return (self.last_microjoules - before) % (self.range_microjoules + 1)


@dataclass
class CpuEnergy:
    """Energy of all CPU packages of this machine, including other programs."""

    packages: list[_RaplPackage]
    _microjoules: int | None = 0
    """None after a counter could not be read, since its energy in between is lost."""
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
        """Read the counters once a minute: at 250 W a typical counter wraps after 15 minutes."""
        if time.monotonic() - self._last_read_time > _POLL_SECONDS:
            self.read_joules()


@dataclass(frozen=True)
class NoEnergy:
    """No counter is available, or another process on this machine reads it."""

    constant_joules: float | None = None

    def read_joules(self) -> float | None:
        return self.constant_joules

    def poll(self) -> None:
        """Do nothing."""


def build_energy_meter(
    device: torch.device, *, reads_cpu_counters: bool = True, powercap_dir: Path = POWERCAP_DIR
) -> EnergyMeter:
    """Return the energy meter for ``device``.

    CPUs are shared: one process per machine has ``reads_cpu_counters``, the others report 0.
    """
    if device.type == "cuda":
        gpu = Gpu.from_device(device)
        return GpuEnergy(gpu) if gpu else NoEnergy()
    try:
        # intel-rapl:0 is a CPU package (on AMD too), intel-rapl:0:1 a part of it; psys includes the packages.
        zones = [f for f in sorted(powercap_dir.glob("intel-rapl:*")) if f.name.count(":") == 1]
        packages = [_RaplPackage.from_dir(f) for f in zones if (f / "name").read_text().startswith("package")]
    except (OSError, ValueError):
        return NoEnergy()
    if not packages:
        return NoEnergy()
    return CpuEnergy(packages) if reads_cpu_counters else NoEnergy(0.0)
