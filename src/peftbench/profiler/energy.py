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

    def joules(self) -> float | None:
        """So far."""

    def keep_up(self) -> None:
        """Look at counters that would run over unseen."""


@dataclass
class GpuEnergy:
    """Of one GPU's board."""

    gpu: Gpu

    def joules(self) -> float | None:
        return self.gpu.joules()

    def keep_up(self) -> None:
        """The counter has 64 bits."""


@dataclass
class _RaplPackage:
    """One processor's counter, in microjoules, which starts anew at its range."""

    energy: Path
    range_microjoules: int
    last: int

    @classmethod
    def read(cls, folder: Path) -> _RaplPackage:
        energy = folder / "energy_uj"
        return cls(energy, int((folder / "max_energy_range_uj").read_text()), int(energy.read_text()))

    def since_last(self) -> int:
        """Microjoules since this was last asked, right as long as the counter ran over once at most."""
        before, self.last = self.last, int(self.energy.read_text())
        return (self.last - before) % (self.range_microjoules + 1)


@dataclass
class CpuEnergy:
    """Of all processors of this machine, whatever else runs on them."""

    packages: list[_RaplPackage]
    _microjoules: int | None = 0
    """None once a counter could not be read: what it counted meanwhile is lost."""
    _looked: float = field(default_factory=time.monotonic)

    def joules(self) -> float | None:
        self._looked = time.monotonic()
        if self._microjoules is None:
            return None
        try:
            self._microjoules += sum(package.since_last() for package in self.packages)
        except (OSError, ValueError):
            self._microjoules = None
            return None
        return self._microjoules / 1e6

    def keep_up(self) -> None:
        """At 250 W a counter of usual range runs over after a quarter of an hour."""
        if time.monotonic() - self._looked > _POLL_SECONDS:
            self.joules()


@dataclass(frozen=True)
class NoEnergy:
    """Where nothing tells, or where another process of this machine counts for all."""

    told: float | None = None

    def joules(self) -> float | None:
        return self.told

    def keep_up(self) -> None:
        """Nothing to look at."""


def build_energy_meter(device: torch.device, *, counts: bool = True, powercap: Path = POWERCAP_DIR) -> EnergyMeter:
    """The meter of what ``device`` is.

    Processors are shared: only one process of a machine ``counts`` them, and the others say 0.
    """
    if device.type == "cuda":
        gpu = Gpu.of(device)
        return GpuEnergy(gpu) if gpu else NoEnergy()
    try:
        # intel-rapl:0 is a processor, AMD's too; intel-rapl:0:1 is a part of it, and psys counts it once more.
        folders = [f for f in sorted(powercap.glob("intel-rapl:*")) if f.name.count(":") == 1]
        packages = [_RaplPackage.read(f) for f in folders if (f / "name").read_text().startswith("package")]
    except (OSError, ValueError):
        return NoEnergy()
    if not packages:
        return NoEnergy()
    return CpuEnergy(packages) if counts else NoEnergy(0.0)
