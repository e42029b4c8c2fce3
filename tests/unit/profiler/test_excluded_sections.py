"""Sections that no measurement of a training includes: seconds, joules, peaks and the allocator's cache."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import pytest
import torch

from peftbench.profiler.probe import Probe
from peftbench.record import Memory

MIB = 2**20


@dataclass
class CountedEnergy:
    """An energy counter that only the tests advance."""

    joules: float | None = 100.0

    def read_joules(self) -> float | None:
        """Return the joules so far."""
        return self.joules

    def poll(self) -> None:
        """Do nothing."""

    def use(self, joules: float) -> None:
        """Count more energy."""
        assert self.joules is not None
        self.joules += joules


@dataclass
class CachingMeter:
    """The meter of a GPU whose allocator keeps what a section reserved."""

    supports_step_parts: bool = False
    cuda_context_bytes: int | None = None
    reserved: int = 0
    peak: int = 0
    events: list[str] = field(default_factory=list)

    def lap(self, *, within_steps: bool = False) -> Memory:
        """Return the largest reserved bytes since the last lap."""
        peak, self.peak = self.peak, self.reserved
        return Memory(reserved_bytes=peak)

    def reserve(self, size: int) -> None:
        """Reserve at least ``size`` bytes."""
        self.reserved = max(self.reserved, size)
        self.peak = max(self.peak, self.reserved)

    def read_process_bytes(self) -> int | None:
        """Return nothing: not measured."""
        return None

    def read_in_use_bytes(self) -> int | None:
        """Return the reserved bytes."""
        return self.reserved

    def empty_cache(self) -> None:
        """Release what is reserved."""
        self.events.append("empty_cache")
        self.reserved = 0

    def set_baseline(self) -> None:
        """Do nothing."""


def touch(size: int) -> None:
    """Make ``size`` bytes resident and release them."""
    with mmap.mmap(-1, size) as pages:
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1


def test_energy_excludes_the_section() -> None:
    """The energy of a pause counts in its phase, that of an excluded section in none."""
    meter = CountedEnergy()
    probe = Probe(torch.device("cpu"), meter)
    with probe.phase("train"):
        meter.use(1)
        with probe.paused():
            meter.use(2)
            with probe.excluded("evaluate"):
                meter.use(4)
        meter.use(8)
        assert probe.state_dict()["phase_joules"] == {"train": 11}
    with probe.phase("evaluate"):
        meter.use(16)
    assert probe.phase_joules == {"train": 11, "evaluate": 16}


def test_unknown_energy_stays_unknown() -> None:
    """Without a counter there are no joules."""
    probe = Probe(torch.device("cpu"), CountedEnergy(None))
    with probe.phase("train"), probe.paused(), probe.excluded("evaluate"):
        pass
    assert probe.phase_joules == {}


def test_peak_excludes_the_section() -> None:
    """On CPU the peak is that of the steps before and after; the section knows its own duration."""
    probe = Probe(torch.device("cpu"))
    with probe.phase("train"):
        touch(64 * MIB)
        with probe.paused(), probe.excluded("evaluate") as section:
            touch(512 * MIB)
        touch(32 * MIB)
    peak = probe.memory["train"]
    if peak.rss_bytes is None or peak.baseline_rss_bytes is None:
        pytest.skip("this kernel does not report a process's peak RSS")
    assert peak.rss_bytes - peak.baseline_rss_bytes == pytest.approx(64 * MIB, abs=24 * MIB)
    assert section.seconds > 0
    assert probe.phase_seconds["train"] < section.seconds + 5


@pytest.mark.parametrize(("needed", "events"), [(900, ["empty_cache"]), (300, [])], ids=["grows", "fits"])
def test_reserved_memory_of_the_section_is_released(needed: int, events: list[str]) -> None:
    """Release what the allocator reserved for the section; if the section fits the cache, the cache is kept."""
    probe = Probe(torch.device("cpu"))
    meter = CachingMeter()
    probe.memory_meter = meter
    with probe.phase("train"):
        meter.events.clear()
        meter.reserve(500)
        with probe.paused(), probe.excluded("evaluate"):
            meter.reserve(needed)
        meter.reserve(500)
    assert meter.events == events
    assert probe.memory["train"].reserved_bytes == 500


def test_phase_of_an_error_is_the_section() -> None:
    """An error in the section is reported with its name; after a section without one, the phase continues."""
    probe = Probe(torch.device("cpu"))
    with pytest.raises(RuntimeError), probe.phase("train"), probe.paused(), probe.excluded("evaluate"):
        raise RuntimeError
    assert probe.current_phase == "evaluate"
    other = Probe(torch.device("cpu"))
    with other.phase("train"):
        with other.paused(), other.excluded("evaluate"):
            assert other.current_phase == "evaluate"
        assert other.current_phase == "train"
