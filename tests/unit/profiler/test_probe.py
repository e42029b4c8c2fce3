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
    with probe.training(untimed_steps=2):
        for seconds in (10, 20, 1, 2, 3):
            clock.sleep(0.5)  # a batch is made
            with probe.step():
                clock.sleep(seconds)
    assert probe.phase_seconds == {"warmup": 31.0, "train": 7.5}
    assert probe.step_seconds == [10, 20, 1, 2, 3]


def test_no_warm_up(probe: Probe, clock: Clock) -> None:
    """With no warm-up steps everything is training."""
    with probe.training(untimed_steps=0), probe.step():
        clock.sleep(3)
    assert probe.phase_seconds == {"train": 3}


def test_all_warm_up(probe: Probe, clock: Clock) -> None:
    """With fewer steps than warm-up has, nothing is training, and no figure is made of nothing."""
    for steps in (1, 2):
        with probe.training(untimed_steps=2):
            for _ in range(steps):
                with probe.step():
                    clock.sleep(3)
    assert probe.phase_seconds == {"warmup": 9}
    assert "train" not in probe.memory


@pytest.mark.parametrize(("fails_at", "phase"), [(1, "warmup"), (3, "train")])
def test_a_step_that_raises_names_its_phase(fails_at: int, phase: str, probe: Probe, clock: Clock) -> None:
    """What ends the loop is in the phase it happened in, with the seconds until then."""

    def run() -> None:
        with probe.training(untimed_steps=2):
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
    with probe.training(untimed_steps=2, get_step_context=looker.step):
        for _ in range(4):
            with probe.step():
                pass
    assert (looker.steps, looker.left) == ([1, 2], 2)
    with probe.training(untimed_steps=0, get_step_context=looker.step), probe.step():
        pass
    assert looker.steps == [1, 2]


def test_parts_are_timed_in_warm_up_steps_that_nobody_looks_at(probe: Probe, clock: Clock) -> None:
    """The median of each part's seconds, micro-batches added up; not of the first step, nor of one slowed down."""
    looker = Looker(looks_at=(3,))
    with probe.training(untimed_steps=5, get_step_context=looker.step):
        for seconds in (100, 1, 50, 2, 9, 70):
            with probe.step():
                for part in ("forward", "backward", "forward", "optimizer"):
                    with probe.part(part):
                        clock.sleep(seconds)
    assert probe.compute_step_part_seconds() == {"forward": 4, "backward": 2, "optimizer": 2}
    assert list(probe.part_timed_steps) == [2, 4, 5]
    assert Probe(torch.device("cpu")).compute_step_part_seconds() == {}
