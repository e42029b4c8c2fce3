"""Seconds of phases, steps and pauses, with a fake clock that only the tests advance."""

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
    """A clock that advances only by ``sleep``."""

    now: float = 1000.0

    def perf_counter(self) -> float:
        """Return the time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Advance the time."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the probe's clock."""
    fake = Clock()
    monkeypatch.setattr(peftbench.profiler.probe, "time", SimpleNamespace(perf_counter=fake.perf_counter))
    return fake


@pytest.fixture
def probe() -> Probe:
    """Return a probe on CPU."""
    return Probe(torch.device("cpu"))


def test_phase_excludes_pause_on_real_clock(probe: Probe) -> None:
    """On the real clock, a sleep counts in its phase and a pause does not."""
    with probe.phase("train"):
        time.sleep(0.1)
        with probe.paused():
            time.sleep(0.4)
    assert 0.09 < probe.phase_seconds["train"] < 0.4


def test_phase_seconds_are_added_by_phase(probe: Probe, clock: Clock) -> None:
    """Each phase has its own seconds; those of several sections are added."""
    with probe.phase("build"):
        clock.sleep(1)
    clock.sleep(2)  # between phases
    with probe.phase("train"):
        clock.sleep(4)
    with probe.phase("build"):
        clock.sleep(8)
    assert probe.phase_seconds == {"build": 9, "train": 4}
    assert probe.step_seconds == []


def test_step_seconds_are_listed_by_step(probe: Probe, clock: Clock) -> None:
    """Each step has its own seconds; the phase includes all of them and the time in between."""
    with probe.phase("train"):
        for seconds in (1, 2):
            with probe.step():
                clock.sleep(seconds)
            clock.sleep(4)
    assert probe.step_seconds == [1, 2]
    assert probe.phase_seconds == {"train": 11}


def test_pause_counts_in_neither_step_nor_phase(probe: Probe, clock: Clock) -> None:
    """A pause inside or between steps is excluded from both."""
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


def test_pause_shortens_only_its_own_phase(probe: Probe, clock: Clock) -> None:
    """A later phase and its steps are unchanged."""
    with probe.phase("build"), probe.paused():
        clock.sleep(1)
    with probe.phase("train"), probe.step():
        clock.sleep(2)
    assert probe.phase_seconds == {"build": 0, "train": 2}
    assert probe.step_seconds == [2]


def test_phase_that_raises_keeps_its_seconds(probe: Probe, clock: Clock) -> None:
    """It is measured up to the error and stays the current phase, for the outcome."""
    with suppress(ZeroDivisionError), probe.phase("train"):
        clock.sleep(1)
        raise ZeroDivisionError
    assert probe.phase_seconds == {"train": 1}
    assert probe.current_phase == "train"


def test_pause_that_raises_is_excluded(probe: Probe, clock: Clock) -> None:
    """A pause that fails does not count in the phase."""
    with suppress(ZeroDivisionError), probe.phase("train"):
        clock.sleep(1)
        with probe.paused():
            clock.sleep(2)
            raise ZeroDivisionError
    assert probe.phase_seconds == {"train": 1}


def test_step_that_raises_is_not_recorded(probe: Probe, clock: Clock) -> None:
    """Only finished steps are recorded; the seconds of a failed one count in its phase."""
    with suppress(ZeroDivisionError), probe.phase("train"), probe.step():
        clock.sleep(1)
        raise ZeroDivisionError
    assert probe.step_seconds == []
    assert probe.phase_seconds == {"train": 1}


def test_current_phase_is_the_innermost(probe: Probe) -> None:
    """After an inner phase, the outer phase is current again."""
    assert probe.current_phase is None
    with probe.phase("train"):
        assert probe.current_phase == "train"
        with probe.phase("evaluate"):
            assert probe.current_phase == "evaluate"
        assert probe.current_phase == "train"
    assert probe.current_phase is None


def test_warmup_is_a_separate_phase(probe: Probe, clock: Clock) -> None:
    """The first steps and the time between them count in warmup, not in train."""
    with probe.training(untimed_steps=2):
        for seconds in (10, 20, 1, 2, 3):
            clock.sleep(0.5)  # a batch is built
            with probe.step():
                clock.sleep(seconds)
    assert probe.phase_seconds == {"warmup": 31.0, "train": 7.5}
    assert probe.step_seconds == [10, 20, 1, 2, 3]


def test_training_without_warmup_has_no_warmup_phase(probe: Probe, clock: Clock) -> None:
    """Without warm-up steps, all time is training."""
    with probe.training(untimed_steps=0), probe.step():
        clock.sleep(3)
    assert probe.phase_seconds == {"train": 3}


def test_warmup_alone_has_no_train_phase(probe: Probe, clock: Clock) -> None:
    """With no more steps than warm-up steps, there is no train phase."""
    for steps in (1, 2):
        with probe.training(untimed_steps=2):
            for _ in range(steps):
                with probe.step():
                    clock.sleep(3)
    assert probe.phase_seconds == {"warmup": 9}
    assert "train" not in probe.memory


@pytest.mark.parametrize(("fails_at", "phase"), [(1, "warmup"), (3, "train")])
def test_error_in_step_keeps_its_phase(fails_at: int, phase: str, probe: Probe, clock: Clock) -> None:
    """The phase of the error is current, with the seconds up to the error."""

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


# --- instruments ------------------------------------------------------------------------------------------------------


@dataclass
class FakeInstrument:
    """Records the steps it was used for."""

    instrumented: tuple[int, ...] = (1, 2)
    steps: list[int] = field(default_factory=list)
    exits: int = 0

    def get_step_context(self, number: int) -> AbstractContextManager[None] | None:
        """Return a context for instrumented steps."""
        self.steps.append(number)
        return self.measure() if number in self.instrumented else None

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Wrap a step."""
        yield
        self.exits += 1


def test_only_warmup_steps_are_instrumented(probe: Probe) -> None:
    """Instruments, which slow a step down, are never used in a timed step."""
    instrument = FakeInstrument()
    with probe.training(untimed_steps=2, get_step_context=instrument.get_step_context):
        for _ in range(4):
            with probe.step():
                pass
    assert (instrument.steps, instrument.exits) == ([1, 2], 2)
    with probe.training(untimed_steps=0, get_step_context=instrument.get_step_context), probe.step():
        pass
    assert instrument.steps == [1, 2]


def test_parts_are_timed_in_warmup_steps_without_instruments(probe: Probe, clock: Clock) -> None:
    """Median seconds of each part over micro-batches, without the first and the instrumented step."""
    instrument = FakeInstrument(instrumented=(3,))
    with probe.training(untimed_steps=5, get_step_context=instrument.get_step_context):
        for seconds in (100, 1, 50, 2, 9, 70):
            with probe.step():
                for part in ("forward", "backward", "forward", "optimizer"):
                    with probe.part(part):
                        clock.sleep(seconds)
    assert probe.compute_step_part_seconds() == {"forward": 4, "backward": 2, "optimizer": 2}
    assert list(probe.part_timed_steps) == [2, 4, 5]
    assert Probe(torch.device("cpu")).compute_step_part_seconds() == {}
