"""Peaks and energy land in the phases and the parts of steps that made them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from peftbench.profiler.probe import Probe
from peftbench.record import Memory


@dataclass
class Counters:
    """A device's peak counter that only the tests move."""

    supports_step_parts: bool = True
    cuda_context_bytes: int | None = 5
    peak: int = 0
    held: int | None = 70
    reserved: int = 0

    def lap(self) -> Memory:
        """The peak since the lap before."""
        told, self.peak = self.peak, 0
        return Memory(allocated_bytes=told)

    def read_in_use_bytes(self) -> int | None:
        """Nobody watches."""
        return None

    def read_process_bytes(self) -> int | None:
        """What the driver says."""
        return self.held

    def empty_cache(self) -> None:
        """Give back what is reserved and not held."""
        self.reserved = 0

    def set_baseline(self) -> None:
        """Nothing was held before."""

    def reach(self, allocated: int) -> None:
        """Let something that large be there for a moment."""
        self.peak = max(self.peak, allocated)


def measured(counters: Counters) -> Probe:
    """A probe of the device with these counters."""
    probe = Probe(torch.device("cpu"))
    probe.memory_meter = counters
    return probe


def peaks(memory: dict[str, Memory]) -> dict[str, int | None]:
    """Allocated bytes alone."""
    return {name: peak.allocated_bytes for name, peak in memory.items()}


def test_what_lies_within_counts_for_what_lies_around() -> None:
    """A phase within a phase has its own peak, which is the outer one's too; what was before it is not."""
    counters = Counters()
    probe = measured(counters)
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


def test_reserved_memory_is_given_back_between_phases_but_not_before_training() -> None:
    """What warm-up has reserved is what training goes on with; an evaluation does not show training's cache."""
    counters = Counters()
    probe = measured(counters)
    found: list[int] = []
    counters.reserved = 9
    with probe.training(untimed_steps=1):
        for reserved in (5, 6):
            with probe.step():
                found.append(counters.reserved)
                counters.reserved = reserved
    with probe.phase("evaluate"):
        found.append(counters.reserved)
    assert found == [0, 5, 0]


def step_of(probe: Probe, counters: Counters, forward: int, backward: int, optimizer: int) -> None:
    """One step whose parts reach these sizes."""
    with probe.step():
        for part, size in (("forward", forward), ("backward", backward), ("optimizer", optimizer)):
            with probe.part(part):
                assert probe.current_step_part == part
                counters.reach(size)


def test_parts_of_a_step_have_peaks_of_their_own() -> None:
    """The largest of each part over all steps after warm-up; the phase has the largest of all."""
    counters = Counters()
    probe = measured(counters)
    with probe.training(untimed_steps=1):
        step_of(probe, counters, 90, 80, 70)
        step_of(probe, counters, 5, 9, 2)
        step_of(probe, counters, 6, 8, 3)
        counters.reach(1)
    assert peaks(probe.step_memory) == {"forward": 6, "backward": 9, "optimizer": 3}
    assert peaks(probe.memory) == {"warmup": 90, "train": 9}
    assert probe.current_step_part is None


def test_parts_are_not_told_apart_where_that_would_cost() -> None:
    """A device whose laps take long has peaks of phases alone."""
    counters = Counters(supports_step_parts=False)
    probe = measured(counters)
    with probe.training(untimed_steps=0):
        step_of(probe, counters, 5, 9, 2)
    assert probe.step_memory == {}
    assert peaks(probe.memory) == {"train": 9}


def test_a_part_that_raises_keeps_its_peak_and_is_named() -> None:
    """An out-of-memory in the backward pass is in the backward pass's peak."""
    counters = Counters()
    probe = measured(counters)
    with suppress(ZeroDivisionError), probe.training(untimed_steps=0), probe.step(), probe.part("backward"):
        counters.reach(4)
        raise ZeroDivisionError
    assert probe.current_step_part == "backward"
    assert probe.current_phase == "train"
    assert peaks(probe.step_memory) == {"backward": 4}
    assert peaks(probe.memory) == {"train": 4}


def test_an_error_in_warm_up_keeps_the_peaks_of_its_parts() -> None:
    """Most runs that do not fit end there: what they reached, by part and by the driver's word, is what is wanted."""
    counters = Counters()
    probe = measured(counters)
    with suppress(ZeroDivisionError), probe.training(untimed_steps=2), probe.step():
        with probe.part("forward"):
            counters.reach(3)
        with probe.part("backward"):
            counters.reach(4)
            raise ZeroDivisionError
    assert peaks(probe.step_memory) == {"forward": 3, "backward": 4}
    assert peaks(probe.memory) == {"warmup": 4}
    assert probe.memory["warmup"].process_bytes == 70


def test_what_is_paused_peaks_in_nothing() -> None:
    """An evaluation in the middle of training shows in no peak of the training, before or after it."""
    counters = Counters()
    probe = measured(counters)
    with probe.training(untimed_steps=0):
        step_of(probe, counters, 5, 6, 2)
        with probe.paused():
            counters.reach(99)
        step_of(probe, counters, 4, 3, 1)
    assert peaks(probe.memory) == {"train": 6}
    assert peaks(probe.step_memory) == {"forward": 5, "backward": 6, "optimizer": 2}


def test_where_all_was_warm_up_parts_have_no_peaks() -> None:
    """What was not measured has no figures."""
    counters = Counters()
    probe = measured(counters)
    with probe.training(untimed_steps=2):
        step_of(probe, counters, 5, 9, 2)
    assert probe.step_memory == {}


# --- energy and inspection -------------------------------------------------------------------------------------------


@dataclass
class Energy:
    """A counter of energy that only the tests move."""

    now: float | None = 100.0
    kept_up: int = 0

    def read_joules(self) -> float | None:
        """So far."""
        return self.now

    def poll(self) -> None:
        """Counted."""
        self.kept_up += 1

    def spend(self, joules: float) -> None:
        """Use some."""
        assert self.now is not None
        self.now += joules


def test_energy_lands_in_its_phase() -> None:
    """Each phase has what was used in it; warm-up is not in the training's; every step lets the counter keep up."""
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
    assert energy.kept_up == 3


def test_unknown_energy_is_no_figure() -> None:
    """Where nothing tells, nothing is said."""
    probe = Probe(torch.device("cpu"))
    with probe.phase("train"):
        pass
    assert probe.phase_joules == {}
