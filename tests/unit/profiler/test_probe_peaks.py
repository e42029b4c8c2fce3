"""Memory peaks and energy by phase and by part of a step."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from peftbench.profiler.probe import Probe
from peftbench.record import Memory


@dataclass
class Counters:
    """A fake memory meter that only the tests change."""

    supports_step_parts: bool = True
    cuda_context_bytes: int | None = 5
    peak: int = 0
    process_bytes: int | None = 70
    reserved: int = 0

    def lap(self, *, within_steps: bool = False) -> Memory:
        """Return and reset the peak."""
        peak, self.peak = self.peak, 0
        return Memory(allocated_bytes=peak)

    def read_in_use_bytes(self) -> int | None:
        """Return None."""
        return None

    def read_process_bytes(self) -> int | None:
        """Return the driver's value."""
        return self.process_bytes

    def empty_cache(self) -> None:
        """Release reserved memory."""
        self.reserved = 0

    def set_baseline(self) -> None:
        """Do nothing."""

    def reach(self, allocated: int) -> None:
        """Allocate and free this size."""
        self.peak = max(self.peak, allocated)


def build_probe(counters: Counters) -> Probe:
    """Return a probe with this meter."""
    probe = Probe(torch.device("cpu"))
    probe.memory_meter = counters
    return probe


def peaks(memory: dict[str, Memory]) -> dict[str, int | None]:
    """Return the allocated bytes."""
    return {name: peak.allocated_bytes for name, peak in memory.items()}


def test_inner_peak_counts_in_outer_phase() -> None:
    """A nested phase has its own peak, which also counts in the outer one; earlier peaks do not."""
    counters = Counters()
    probe = build_probe(counters)
    counters.reach(99)
    with probe.phase("outer"):
        counters.reach(3)
        with probe.phase("inner"):
            counters.reach(7)
        counters.reach(2)
    with probe.phase("later"):
        counters.reach(1)
    assert peaks(probe.memory) == {"outer": 7, "inner": 7, "later": 1}
    assert {memory.process_bytes for memory in probe.memory.values()} == {70}


def test_cache_is_emptied_between_phases_but_not_after_warmup() -> None:
    """Training keeps what warm-up reserved; evaluation starts without training's cache."""
    counters = Counters()
    probe = build_probe(counters)
    reserved_at_start: list[int] = []
    counters.reserved = 9
    with probe.training(untimed_steps=1):
        for reserved in (5, 6):
            with probe.step():
                reserved_at_start.append(counters.reserved)
                counters.reserved = reserved
    with probe.phase("evaluate"):
        reserved_at_start.append(counters.reserved)
    assert reserved_at_start == [0, 5, 0]


def run_step(probe: Probe, counters: Counters, forward: int, backward: int, optimizer: int) -> None:
    """Run a step whose parts have these peaks."""
    with probe.step():
        for part, size in (("forward", forward), ("backward", backward), ("optimizer", optimizer)):
            with probe.part(part):
                assert probe.current_step_part == part
                counters.reach(size)


def test_step_part_peaks_exclude_warmup() -> None:
    """Each part has its maximum over the steps after warm-up; the phase has the maximum of all parts."""
    counters = Counters()
    probe = build_probe(counters)
    with probe.training(untimed_steps=1):
        run_step(probe, counters, 90, 80, 70)
        run_step(probe, counters, 5, 9, 2)
        run_step(probe, counters, 6, 8, 3)
        counters.reach(1)
    assert peaks(probe.step_memory) == {"forward": 6, "backward": 9, "optimizer": 3}
    assert peaks(probe.memory) == {"warmup": 90, "train": 9}
    assert probe.current_step_part is None


def test_expensive_laps_disable_step_part_peaks() -> None:
    """Only the peaks of phases are recorded."""
    counters = Counters(supports_step_parts=False)
    probe = build_probe(counters)
    with probe.training(untimed_steps=0):
        run_step(probe, counters, 5, 9, 2)
    assert probe.step_memory == {}
    assert peaks(probe.memory) == {"train": 9}


def test_part_that_raises_keeps_its_peak_and_name() -> None:
    """An error in the backward pass keeps its peak and its part."""
    counters = Counters()
    probe = build_probe(counters)
    with suppress(ZeroDivisionError), probe.training(untimed_steps=0), probe.step(), probe.part("backward"):
        counters.reach(4)
        raise ZeroDivisionError
    assert probe.current_step_part == "backward"
    assert probe.current_phase == "train"
    assert peaks(probe.step_memory) == {"backward": 4}
    assert peaks(probe.memory) == {"train": 4}


def test_error_in_warmup_keeps_step_part_peaks() -> None:
    """Most runs that do not fit fail in warm-up; peaks of parts and the driver's value are recorded."""
    counters = Counters()
    probe = build_probe(counters)
    with suppress(ZeroDivisionError), probe.training(untimed_steps=2), probe.step():
        with probe.part("forward"):
            counters.reach(3)
        with probe.part("backward"):
            counters.reach(4)
            raise ZeroDivisionError
    assert peaks(probe.step_memory) == {"forward": 3, "backward": 4}
    assert peaks(probe.memory) == {"warmup": 4}
    assert probe.memory["warmup"].process_bytes == 70


def test_pause_counts_in_no_peak() -> None:
    """An evaluation during training counts in no training peak."""
    counters = Counters()
    probe = build_probe(counters)
    with probe.training(untimed_steps=0):
        run_step(probe, counters, 5, 6, 2)
        with probe.paused():
            counters.reach(99)
        run_step(probe, counters, 4, 3, 1)
    assert peaks(probe.memory) == {"train": 6}
    assert peaks(probe.step_memory) == {"forward": 5, "backward": 6, "optimizer": 2}


def test_warmup_alone_has_no_step_part_peaks() -> None:
    """Without timed steps there are no peaks of parts."""
    counters = Counters()
    probe = build_probe(counters)
    with probe.training(untimed_steps=2):
        run_step(probe, counters, 5, 9, 2)
    assert probe.step_memory == {}


# --- energy -------------------------------------------------------------------------------------------


@dataclass
class Energy:
    """A fake energy meter that only the tests change."""

    now: float | None = 100.0
    num_polls: int = 0

    def read_joules(self) -> float | None:
        """Return the joules so far."""
        return self.now

    def poll(self) -> None:
        """Count the call."""
        self.num_polls += 1

    def spend(self, joules: float) -> None:
        """Add energy."""
        assert self.now is not None
        self.now += joules


def test_energy_counts_in_its_phase() -> None:
    """Each phase has its own energy, warm-up is not training, and every step polls the meter."""
    energy = Energy()
    probe = Probe(torch.device("cpu"), energy)
    with probe.phase("build"):
        energy.spend(1)
    energy.spend(2)
    with probe.training(untimed_steps=1):
        for joules in (4.0, 8.0, 16.0):
            with probe.step():
                energy.spend(joules)
    assert probe.phase_joules == {"build": 1, "warmup": 4, "train": 24}
    assert energy.num_polls == 3


def test_unknown_energy_is_not_recorded() -> None:
    """Without a meter there is no energy."""
    probe = Probe(torch.device("cpu"))
    with probe.phase("train"):
        pass
    assert probe.phase_joules == {}
