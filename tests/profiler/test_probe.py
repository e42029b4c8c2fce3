"""Three clocks that are kept apart: phases, steps, and what is paused and belongs to neither.

Time is a clock that only the tests move, so that a second in a wrong place shows and a busy machine does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import peftbench.profiler.probe
from peftbench.profiler.probe import Probe
from peftbench.record import Memory


@dataclass
class Clock:
    """A clock that stands still until it is told."""

    now: float = 1000.0

    def perf_counter(self) -> float:
        """The time, as the probe asks for it."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The probe's only clock."""
    made = Clock()
    monkeypatch.setattr(peftbench.profiler.probe, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


@pytest.fixture
def probe() -> Probe:
    """A probe on CPU."""
    return Probe(torch.device("cpu"))


def test_real_sleeps_land_in_their_phases(probe: Probe) -> None:
    """On the machine's own clock, a sleep is in its phase and a pause in none."""
    with probe.phase("train"):
        time.sleep(0.1)
        with probe.paused():
            time.sleep(0.4)
    assert 0.09 < probe.phase_seconds["train"] < 0.4


def test_a_sleep_lands_in_its_phase(probe: Probe, clock: Clock) -> None:
    """Each phase has the seconds spent in it and no other's; entered again, they add up."""
    with probe.phase("build"):
        clock.sleep(1)
    clock.sleep(2)  # between phases, in none
    with probe.phase("train"):
        clock.sleep(4)
    with probe.phase("build"):
        clock.sleep(8)
    assert probe.phase_seconds == {"build": 9, "train": 4}
    assert probe.step_seconds == []


def test_a_sleep_lands_in_its_step(probe: Probe, clock: Clock) -> None:
    """Each step has its own seconds, and the phase around them has all."""
    with probe.phase("train"):
        for seconds in (1, 2):
            with probe.step():
                clock.sleep(seconds)
            clock.sleep(4)
    assert probe.step_seconds == [1, 2]
    assert probe.phase_seconds == {"train": 11}


def test_paused_time_is_in_none(probe: Probe, clock: Clock) -> None:
    """What is paused is neither in the step around it nor in the phase, wherever in them it is."""
    with probe.phase("train"):
        with probe.step():
            clock.sleep(1)
            with probe.paused():
                clock.sleep(2)
            clock.sleep(4)
        with probe.paused():
            clock.sleep(8)
        clock.sleep(16)
    assert probe.step_seconds == [5]
    assert probe.phase_seconds == {"train": 21}


def test_what_was_paused_before_is_not_taken_off_again(probe: Probe, clock: Clock) -> None:
    """A pause shortens the phase it lies in and no later one."""
    with probe.phase("build"), probe.paused():
        clock.sleep(1)
    with probe.phase("train"), probe.step():
        clock.sleep(2)
    assert probe.phase_seconds == {"build": 0, "train": 2}
    assert probe.step_seconds == [2]


def test_a_phase_that_raises_keeps_its_seconds(probe: Probe, clock: Clock) -> None:
    """A phase that fails is measured until then and stays the current one, so that the outcome can name it."""
    with suppress(ZeroDivisionError), probe.phase("train"):
        clock.sleep(1)
        raise ZeroDivisionError
    assert probe.phase_seconds == {"train": 1}
    assert probe.current_phase == "train"


def test_a_pause_that_raises_is_still_a_pause(probe: Probe, clock: Clock) -> None:
    """A pause that fails belongs to no phase either."""
    with suppress(ZeroDivisionError), probe.phase("train"):
        clock.sleep(1)
        with probe.paused():
            clock.sleep(2)
            raise ZeroDivisionError
    assert probe.phase_seconds == {"train": 1}


def test_a_step_that_raises_is_no_step(probe: Probe, clock: Clock) -> None:
    """Only finished steps are counted; the seconds of one that failed are in its phase."""
    with suppress(ZeroDivisionError), probe.phase("train"), probe.step():
        clock.sleep(1)
        raise ZeroDivisionError
    assert probe.step_seconds == []
    assert probe.phase_seconds == {"train": 1}


def test_current_phase(probe: Probe) -> None:
    """The probe knows the phase it is in, and comes back to the outer one."""
    assert probe.current_phase is None
    with probe.phase("train"):
        assert probe.current_phase == "train"
        with probe.phase("evaluate"):
            assert probe.current_phase == "evaluate"
        assert probe.current_phase == "train"
    assert probe.current_phase is None


def test_warm_up_is_a_phase_of_its_own(probe: Probe, clock: Clock) -> None:
    """The first steps, and what is between them, are in the warm-up's seconds and not in the training's."""
    with probe.training(warmup_steps=2):
        for seconds in (10, 20, 1, 2, 3):
            clock.sleep(0.5)  # a batch is made
            with probe.step():
                clock.sleep(seconds)
    assert probe.phase_seconds == {"warmup": 31.0, "train": 7.5}
    assert probe.step_seconds == [10, 20, 1, 2, 3]


def test_no_warm_up(probe: Probe, clock: Clock) -> None:
    """With no warm-up steps everything is training."""
    with probe.training(warmup_steps=0), probe.step():
        clock.sleep(3)
    assert probe.phase_seconds == {"train": 3}


def test_all_warm_up(probe: Probe, clock: Clock) -> None:
    """With fewer steps than warm-up has, nothing is training, and no figure is made of nothing."""
    for steps in (1, 2):
        with probe.training(warmup_steps=2):
            for _ in range(steps):
                with probe.step():
                    clock.sleep(3)
    assert probe.phase_seconds == {"warmup": 9}
    assert "train" not in probe.memory


@pytest.mark.parametrize(("fails_at", "phase"), [(1, "warmup"), (3, "train")])
def test_a_step_that_raises_names_its_phase(fails_at: int, phase: str, probe: Probe, clock: Clock) -> None:
    """What ends the loop is in the phase it happened in, with the seconds until then."""

    def run() -> None:
        with probe.training(warmup_steps=2):
            for number in range(5):
                with probe.step():
                    clock.sleep(1)
                    if number == fails_at:
                        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert probe.current_phase == phase
    assert sum(probe.phase_seconds.values()) == fails_at + 1


# --- peaks -----------------------------------------------------------------------------------------------------------


@dataclass
class Counters:
    """A device's peak counter that only the tests move."""

    every_part: bool = True
    context_bytes: int | None = 5
    peak: int = 0
    held: int | None = 70
    reserved: int = 0

    def lap(self) -> Memory:
        """The peak since the lap before."""
        told, self.peak = self.peak, 0
        return Memory(allocated_bytes=told)

    def process_bytes(self) -> int | None:
        """What the driver says."""
        return self.held

    def forget(self) -> None:
        """Give back what is reserved and not held."""
        self.reserved = 0

    def reach(self, allocated: int) -> None:
        """Let something that large be there for a moment."""
        self.peak = max(self.peak, allocated)


def measured(counters: Counters) -> Probe:
    """A probe of the device with these counters."""
    probe = Probe(torch.device("cpu"))
    probe.meter = counters
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
    with probe.training(warmup_steps=1):
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
                assert probe.current_part == part
                counters.reach(size)


def test_parts_of_a_step_have_peaks_of_their_own() -> None:
    """The largest of each part over all steps after warm-up; the phase has the largest of all."""
    counters = Counters()
    probe = measured(counters)
    with probe.training(warmup_steps=1):
        step_of(probe, counters, 90, 80, 70)
        step_of(probe, counters, 5, 9, 2)
        step_of(probe, counters, 6, 8, 3)
        counters.reach(1)
    assert peaks(probe.step_memory) == {"forward": 6, "backward": 9, "optimizer": 3}
    assert peaks(probe.memory) == {"warmup": 90, "train": 9}
    assert probe.current_part is None


def test_parts_are_not_told_apart_where_that_would_cost() -> None:
    """A device whose laps take long has peaks of phases alone."""
    counters = Counters(every_part=False)
    probe = measured(counters)
    with probe.training(warmup_steps=0):
        step_of(probe, counters, 5, 9, 2)
    assert probe.step_memory == {}
    assert peaks(probe.memory) == {"train": 9}


def test_a_part_that_raises_keeps_its_peak_and_is_named() -> None:
    """An out-of-memory in the backward pass is in the backward pass's peak."""
    counters = Counters()
    probe = measured(counters)
    with suppress(ZeroDivisionError), probe.training(warmup_steps=0), probe.step(), probe.part("backward"):
        counters.reach(4)
        raise ZeroDivisionError
    assert probe.current_part == "backward"
    assert probe.current_phase == "train"
    assert peaks(probe.step_memory) == {"backward": 4}
    assert peaks(probe.memory) == {"train": 4}


def test_an_error_in_warm_up_keeps_the_peaks_of_its_parts() -> None:
    """Most runs that do not fit end there: what they reached, by part and by the driver's word, is what is wanted."""
    counters = Counters()
    probe = measured(counters)
    with suppress(ZeroDivisionError), probe.training(warmup_steps=2), probe.step():
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
    with probe.training(warmup_steps=0):
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
    with probe.training(warmup_steps=2):
        step_of(probe, counters, 5, 9, 2)
    assert probe.step_memory == {}


# --- energy and inspection -------------------------------------------------------------------------------------------


@dataclass
class Energy:
    """A counter of energy that only the tests move."""

    now: float | None = 100.0
    kept_up: int = 0

    def joules(self) -> float | None:
        """So far."""
        return self.now

    def keep_up(self) -> None:
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
    with probe.training(warmup_steps=1):
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


@dataclass
class Looker:
    """An instrument that remembers what it looked at."""

    looks_at: tuple[int, ...] = (1, 2)
    steps: list[int] = field(default_factory=list)
    left: int = 0

    def step(self, number: int) -> AbstractContextManager[None] | None:
        """Look at a step, or not."""
        self.steps.append(number)
        return self.look() if number in self.looks_at else None

    @contextmanager
    def look(self) -> Iterator[None]:
        """Around a step."""
        yield
        self.left += 1


def test_only_warm_up_steps_are_inspected(probe: Probe) -> None:
    """What slows a step down is never around one that counts."""
    looker = Looker()
    with probe.training(warmup_steps=2, inspect=looker.step):
        for _ in range(4):
            with probe.step():
                pass
    assert (looker.steps, looker.left) == ([1, 2], 2)
    with probe.training(warmup_steps=0, inspect=looker.step), probe.step():
        pass
    assert looker.steps == [1, 2]


def test_parts_are_timed_in_warm_up_steps_that_nobody_looks_at(probe: Probe, clock: Clock) -> None:
    """The median of each part's seconds, micro-batches added up; not of the first step, nor of one slowed down."""
    looker = Looker(looks_at=(3,))
    with probe.training(warmup_steps=5, inspect=looker.step):
        for seconds in (100, 1, 50, 2, 9, 70):
            with probe.step():
                for part in ("forward", "backward", "forward", "optimizer"):
                    with probe.part(part):
                        clock.sleep(seconds)
    assert probe.part_seconds() == {"forward": 4, "backward": 2, "optimizer": 2}
    assert list(probe.timed_steps) == [2, 4, 5]
    assert Probe(torch.device("cpu")).part_seconds() == {}
