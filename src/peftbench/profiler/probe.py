"""Probe: the only owner of clocks, synchronisation and peak resets.

Three clocks are kept apart: each phase's, each step's, and what was paused and belongs to neither.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from peftbench.profiler.energy import EnergyMeter, NoEnergy
from peftbench.profiler.memory import max_memory, build_memory_meter
from peftbench.record import Memory


def _no_step_context(_step: int) -> None:
    return None


def _ignore_phase(_phase: str) -> None:
    return None


@dataclass(eq=False)
class _PeakScope:
    """A stretch that is being measured; one may lie within another."""

    name: str
    peak: Memory | None = None


@dataclass
class Probe:
    """Measures a run. The loop calls ``step``, ``part`` and ``paused``, and never looks at a clock itself."""

    device: torch.device
    energy: EnergyMeter = field(default_factory=NoEnergy)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    phase_joules: dict[str, float] = field(default_factory=dict)
    """Energy of each phase, pauses included, where it is known."""
    step_seconds: list[float] = field(default_factory=list)
    timed: list[bool] = field(default_factory=list)
    """Whether each step is in the figures: those of a warm-up are not."""
    memory: dict[str, Memory] = field(default_factory=dict)
    """Peaks of each phase."""
    step_memory: dict[str, Memory] = field(default_factory=dict)
    """Peaks of each part of the steps after warm-up, or of the warm-up where training ended in it; empty where parts
    are not told apart."""
    current_phase: str | None = None
    current_part: str | None = None
    _paused_seconds: float = 0.0
    _phase_start: float = 0.0
    _phase_paused: float = 0.0
    _phase_joules_start: float | None = None
    _parts_before: dict[str, Memory] = field(default_factory=dict)
    _warmup_left: int = 0
    _training: ExitStack = field(default_factory=ExitStack)
    _inspect: Callable[[int], AbstractContextManager[None] | None] = _no_step_context
    _parts: dict[str, float] | None = None
    """Seconds of the parts of a step whose parts are timed, None in all others."""
    timed_steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds of each part, by number of step, of the warm-up steps whose parts were timed."""
    _open: list[_PeakScope] = field(default_factory=list)
    told: Callable[[str], None] = _ignore_phase
    """Is told the name of each phase that begins."""

    def __post_init__(self) -> None:
        self.meter = build_memory_meter(self.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run; entered again, its seconds add up. What raises inside is measured until then."""
        self.told(name)
        outer, paused = self.current_phase, self._paused_seconds
        self.current_phase = name
        joules = self._phase_joules_start = self.energy.joules()
        if outer is None and name != "train":  # what is reserved for the phases before belongs to them
            self.meter.forget()
        with self._peak_of(name, self.memory):
            start = self._phase_start = self._now()
            self._phase_paused = paused
            try:
                yield
                self.current_phase = outer  # on an error the phase stays, so that the outcome can name it
            finally:
                seconds = self._now() - start - (self._paused_seconds - paused)
                self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
                if joules is not None and (now := self.energy.joules()) is not None:
                    self.phase_joules[name] = self.phase_joules.get(name, 0.0) + now - joules
                held = Memory(process_bytes=self.meter.process_bytes())
                self.memory[name] = max_memory(self.memory.get(name), held)

    @contextmanager
    def training(
        self, warmup_steps: int, inspect: Callable[[int], AbstractContextManager[None] | None] = _no_step_context
    ) -> Iterator[None]:
        """The training loop: its first steps are the phase ``warmup``, in no other figure; the rest is ``train``.

        Given its number (from 1), ``inspect`` puts instruments around a warm-up step that may slow it down; where it
        puts none, the parts of the step are timed, but for the first.
        """
        self._warmup_left = warmup_steps
        self._inspect = inspect
        self.meter.forget()  # once: what warm-up reserves is what training goes on with
        self._parts_before = dict(self.step_memory)  # of a training that this one goes on with
        self.step_memory.clear()
        try:
            with self._training:
                self._training.enter_context(self.phase("warmup" if warmup_steps else "train"))
                yield
            if self._warmup_left >= 0:  # an error keeps the peaks of the parts it ended in
                self._forget_parts()
        finally:
            if self._warmup_left >= 0 and not any(self.timed):  # there is nothing to say of training
                self.phase_seconds.pop("train", None)
                self.phase_joules.pop("train", None)
                self.memory.pop("train", None)

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step; its end waits for the device."""
        number, warmup = len(self.step_seconds) + 1, self._warmup_left > 0
        self._warmup_left -= 1
        looks = self._inspect(number) if warmup else None
        self._parts = {} if warmup and looks is None and number > 1 else None
        paused = self._paused_seconds
        start = self._now()
        with looks or nullcontext():
            yield
        self.step_seconds.append(self._now() - start - (self._paused_seconds - paused))
        self.timed.append(not warmup)
        if self._parts:
            self.timed_steps[number] = self._parts
        self.energy.keep_up()
        if self._warmup_left == 0:
            self._training.close()
            self._forget_parts()
            self._training.enter_context(self.phase("train"))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step: ``forward``, ``backward`` or ``optimizer``. It has a peak where the device can tell.

        A peak is since the part before ended, so that each costs one reading.
        """
        self.current_part = name
        start = self._now() if self._parts is not None else 0.0
        try:
            yield
            self.current_part = None  # on an error it stays, so that the outcome can name it
        finally:
            if self._parts is not None:
                self._parts[name] = self._parts.get(name, 0.0) + self._now() - start
            if self.meter.every_part:
                self.step_memory[name] = max_memory(self.step_memory.get(name), self._lap())

    def _forget_parts(self) -> None:
        """Take away the peaks of a warm-up's parts, and bring back those of steps before it."""
        self.step_memory.clear()
        self.step_memory.update(self._parts_before)

    def measured(self) -> dict[str, Any]:
        """All figures so far, plain, for a run that goes on in another process."""
        seconds, joules, memory = dict(self.phase_seconds), dict(self.phase_joules), dict(self.memory)
        if (phase := self.current_phase) is not None:  # it is still open
            now = self._now() - self._phase_start - (self._paused_seconds - self._phase_paused)
            seconds[phase] = seconds.get(phase, 0.0) + now
            if self._phase_joules_start is not None and (drawn := self.energy.joules()) is not None:
                joules[phase] = joules.get(phase, 0.0) + drawn - self._phase_joules_start
        for scope in self._open:
            if scope.peak is not None:
                memory[scope.name] = max_memory(memory.get(scope.name), scope.peak)
        return {
            "phase_seconds": seconds, "phase_joules": joules,
            "step_seconds": list(self.step_seconds), "timed": list(self.timed),
            "timed_steps": {str(step): parts for step, parts in self.timed_steps.items()},
            "memory": {name: peak.model_dump() for name, peak in memory.items()},
            "step_memory": {name: memory.model_dump() for name, memory in self.step_memory.items()},
        }  # fmt: skip

    def close(self) -> None:
        """Keep what was measured of a phase that nothing will end, without waiting for the device."""
        for scope in list(self._open):
            scope.peak = max_memory(scope.peak, self.meter.lap())
            self.memory[scope.name] = max_memory(self.memory.get(scope.name), scope.peak)
        if (phase := self.current_phase) is not None:
            seconds = time.perf_counter() - self._phase_start - (self._paused_seconds - self._phase_paused)
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Something whose memory is in no peak, on CPU too, and that may take long (a checkpoint, say)."""
        self._lap()
        try:
            yield
        finally:
            self.meter.lap()

    def go_on(self, measured: dict[str, Any], *, same_place: bool = True) -> None:
        """Take up figures of the process that this one goes on for; what both have is added up, or the larger peak.

        Where that was another number of processes, its figures are another's, and only its steps are taken up.
        """
        if not same_place:
            self.step_seconds[:], self.timed[:] = measured["step_seconds"], [False] * len(measured["timed"])
            return
        for mine, theirs in ((self.phase_seconds, "phase_seconds"), (self.phase_joules, "phase_joules")):
            for name, value in measured[theirs].items():
                mine[name] = mine.get(name, 0.0) + value
        self.step_seconds[:], self.timed[:] = measured["step_seconds"], measured["timed"]
        self.timed_steps.update({int(step): parts for step, parts in measured["timed_steps"].items()})
        for peaks, kept in ((self.memory, measured["memory"]), (self.step_memory, measured["step_memory"])):
            for name, memory in kept.items():
                peaks[name] = max_memory(peaks.get(name), Memory(**memory))

    def part_seconds(self) -> dict[str, float]:
        """Median seconds of each part, over the warm-up steps whose parts were timed."""
        timed = self.timed_steps.values()
        names = dict.fromkeys(name for parts in timed for name in parts)
        return {name: statistics.median(parts.get(name, 0.0) for parts in timed) for name in names}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Something that is neither part of the phase nor of the step around it.

        Its peak is in none either where readings are cheap; on CPU it is in the phase's.
        """
        start = self._now()
        if self.meter.every_part:
            self._lap()
        try:
            yield
        finally:
            if self.meter.every_part:
                self.meter.lap()
            self._paused_seconds += self._now() - start

    @contextmanager
    def _peak_of(self, name: str, kept: dict[str, Memory]) -> Iterator[None]:
        """Keep the peak of a stretch, also if it raises; what it peaks at counts for the stretches around it too."""
        scope = _PeakScope(name)
        self._lap()
        self._open.append(scope)
        try:
            yield
        finally:
            self._lap()
            self._open.remove(scope)
            if scope.peak is not None:
                kept[name] = max_memory(kept.get(name), scope.peak)

    def _lap(self) -> Memory:
        lap = self.meter.lap()
        for scope in self._open:
            scope.peak = max_memory(scope.peak, lap)
        return lap

    def _now(self) -> float:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:  # after a fatal device error: the time is still worth having
                return time.perf_counter()
        return time.perf_counter()
