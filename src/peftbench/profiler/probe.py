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
from peftbench.profiler.memory import build_memory_meter, max_memory
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
    energy_meter: EnergyMeter = field(default_factory=NoEnergy)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    phase_joules: dict[str, float] = field(default_factory=dict)
    """Energy of each phase, pauses included, where it is known."""
    step_seconds: list[float] = field(default_factory=list)
    timed_mask: list[bool] = field(default_factory=list)
    """Whether each step is in the figures: those of a warm-up are not."""
    memory: dict[str, Memory] = field(default_factory=dict)
    """Peaks of each phase."""
    step_memory: dict[str, Memory] = field(default_factory=dict)
    """Peaks of each part of the steps after warm-up, or of the warm-up where training ended in it; empty where parts
    are not told apart."""
    current_phase: str | None = None
    current_step_part: str | None = None
    _paused_seconds: float = 0.0
    _phase_start: float = 0.0
    _paused_seconds_at_phase_start: float = 0.0
    _phase_joules_start: float | None = None
    _previous_step_memory: dict[str, Memory] = field(default_factory=dict)
    _untimed_steps_left: int = 0
    _training_stack: ExitStack = field(default_factory=ExitStack)
    _get_step_context: Callable[[int], AbstractContextManager[None] | None] = _no_step_context
    _step_part_seconds: dict[str, float] | None = None
    """Seconds of the parts of a step whose parts are timed, None in all others."""
    part_timed_steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds of each part, by number of step, of the warm-up steps whose parts were timed."""
    _open_scopes: list[_PeakScope] = field(default_factory=list)
    on_phase: Callable[[str], None] = _ignore_phase
    """Is told the name of each phase that begins."""

    def __post_init__(self) -> None:
        self.memory_meter = build_memory_meter(self.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run; entered again, its seconds add up. What raises inside is measured until then."""
        self.on_phase(name)
        outer, paused = self.current_phase, self._paused_seconds
        self.current_phase = name
        joules = self._phase_joules_start = self.energy_meter.read_joules()
        if outer is None and name != "train":  # what is reserved for the phases before belongs to them
            self.memory_meter.empty_cache()
        with self._record_peak(name, self.memory):
            start = self._phase_start = self._read_clock()
            self._paused_seconds_at_phase_start = paused
            try:
                yield
                self.current_phase = outer  # on an error the phase stays, so that the outcome can name it
            finally:
                seconds = self._read_clock() - start - (self._paused_seconds - paused)
                self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
                if joules is not None and (now := self.energy_meter.read_joules()) is not None:
                    self.phase_joules[name] = self.phase_joules.get(name, 0.0) + now - joules
                held = Memory(process_bytes=self.memory_meter.read_process_bytes())
                self.memory[name] = max_memory(self.memory.get(name), held)

    @contextmanager
    def training(
        self,
        untimed_steps: int,
        get_step_context: Callable[[int], AbstractContextManager[None] | None] = _no_step_context,
    ) -> Iterator[None]:
        """The training loop: its first steps are the phase ``warmup``, in no other figure; the rest is ``train``.

        Given its number (from 1), ``inspect`` puts instruments around a warm-up step that may slow it down; where it
        puts none, the parts of the step are timed, but for the first.
        """
        self._untimed_steps_left = untimed_steps
        self._get_step_context = get_step_context
        self.memory_meter.empty_cache()  # once: what warm-up reserves is what training goes on with
        self._previous_step_memory = dict(self.step_memory)  # of a training that this one goes on with
        self.step_memory.clear()
        try:
            with self._training_stack:
                self._training_stack.enter_context(self.phase("warmup" if untimed_steps else "train"))
                yield
            if self._untimed_steps_left >= 0:  # an error keeps the peaks of the parts it ended in
                self._restore_step_memory()
        finally:
            if self._untimed_steps_left >= 0 and not any(self.timed_mask):  # there is nothing to say of training
                self.phase_seconds.pop("train", None)
                self.phase_joules.pop("train", None)
                self.memory.pop("train", None)

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step; its end waits for the device."""
        number, warmup = len(self.step_seconds) + 1, self._untimed_steps_left > 0
        self._untimed_steps_left -= 1
        looks = self._get_step_context(number) if warmup else None
        self._step_part_seconds = {} if warmup and looks is None and number > 1 else None
        paused = self._paused_seconds
        start = self._read_clock()
        with looks or nullcontext():
            yield
        self.step_seconds.append(self._read_clock() - start - (self._paused_seconds - paused))
        self.timed_mask.append(not warmup)
        if self._step_part_seconds:
            self.part_timed_steps[number] = self._step_part_seconds
        self.energy_meter.poll()
        if self._untimed_steps_left == 0:
            self._training_stack.close()
            self._restore_step_memory()
            self._training_stack.enter_context(self.phase("train"))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step: ``forward``, ``backward`` or ``optimizer``. It has a peak where the device can tell.

        A peak is since the part before ended, so that each costs one reading.
        """
        self.current_step_part = name
        start = self._read_clock() if self._step_part_seconds is not None else 0.0
        try:
            yield
            self.current_step_part = None  # on an error it stays, so that the outcome can name it
        finally:
            if self._step_part_seconds is not None:
                self._step_part_seconds[name] = self._step_part_seconds.get(name, 0.0) + self._read_clock() - start
            if self.memory_meter.supports_step_parts:
                self.step_memory[name] = max_memory(self.step_memory.get(name), self._lap())

    def _restore_step_memory(self) -> None:
        """Take away the peaks of a warm-up's parts, and bring back those of steps before it."""
        self.step_memory.clear()
        self.step_memory.update(self._previous_step_memory)

    def state_dict(self) -> dict[str, Any]:
        """All figures so far, plain, for a run that goes on in another process."""
        seconds, joules, memory = dict(self.phase_seconds), dict(self.phase_joules), dict(self.memory)
        if (phase := self.current_phase) is not None:  # it is still open
            now = self._read_clock() - self._phase_start - (self._paused_seconds - self._paused_seconds_at_phase_start)
            seconds[phase] = seconds.get(phase, 0.0) + now
            if self._phase_joules_start is not None and (drawn := self.energy_meter.read_joules()) is not None:
                joules[phase] = joules.get(phase, 0.0) + drawn - self._phase_joules_start
        for scope in self._open_scopes:
            if scope.peak is not None:
                memory[scope.name] = max_memory(memory.get(scope.name), scope.peak)
        return {
            "phase_seconds": seconds,
            "phase_joules": joules,
            "step_seconds": list(self.step_seconds),
            "timed": list(self.timed_mask),
            "timed_steps": {str(step): parts for step, parts in self.part_timed_steps.items()},
            "memory": {name: peak.model_dump() for name, peak in memory.items()},
            "step_memory": {name: memory.model_dump() for name, memory in self.step_memory.items()},
        }

    def close_open_phases(self) -> None:
        """Keep what was measured of a phase that nothing will end, without waiting for the device."""
        for scope in list(self._open_scopes):
            scope.peak = max_memory(scope.peak, self.memory_meter.lap())
            self.memory[scope.name] = max_memory(self.memory.get(scope.name), scope.peak)
        if (phase := self.current_phase) is not None:
            seconds = (
                time.perf_counter() - self._phase_start - (self._paused_seconds - self._paused_seconds_at_phase_start)
            )
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds

    @contextmanager
    def exclude_memory(self) -> Iterator[None]:
        """Something whose memory is in no peak, on CPU too, and that may take long (a checkpoint, say)."""
        self._lap()
        try:
            yield
        finally:
            self.memory_meter.lap()

    def load_state_dict(self, state_dict: dict[str, Any], *, same_world_size: bool = True) -> None:
        """Take up figures of the process that this one goes on for; what both have is added up, or the larger peak.

        Where that was another number of processes, its figures are another's, and only its steps are taken up.
        """
        if not same_world_size:
            self.step_seconds[:], self.timed_mask[:] = state_dict["step_seconds"], [False] * len(state_dict["timed"])
            return
        for mine, theirs in ((self.phase_seconds, "phase_seconds"), (self.phase_joules, "phase_joules")):
            for name, value in state_dict[theirs].items():
                mine[name] = mine.get(name, 0.0) + value
        self.step_seconds[:], self.timed_mask[:] = state_dict["step_seconds"], state_dict["timed"]
        self.part_timed_steps.update({int(step): parts for step, parts in state_dict["timed_steps"].items()})
        for peaks, kept in ((self.memory, state_dict["memory"]), (self.step_memory, state_dict["step_memory"])):
            for name, memory in kept.items():
                peaks[name] = max_memory(peaks.get(name), Memory(**memory))

    def compute_step_part_seconds(self) -> dict[str, float]:
        """Median seconds of each part, over the warm-up steps whose parts were timed."""
        timed = self.part_timed_steps.values()
        names = dict.fromkeys(name for parts in timed for name in parts)
        return {name: statistics.median(parts.get(name, 0.0) for parts in timed) for name in names}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Something that is neither part of the phase nor of the step around it.

        Its peak is in none either where readings are cheap; on CPU it is in the phase's.
        """
        start = self._read_clock()
        if self.memory_meter.supports_step_parts:
            self._lap()
        try:
            yield
        finally:
            if self.memory_meter.supports_step_parts:
                self.memory_meter.lap()
            self._paused_seconds += self._read_clock() - start

    @contextmanager
    def _record_peak(self, name: str, peaks: dict[str, Memory]) -> Iterator[None]:
        """Keep the peak of a stretch, also if it raises; what it peaks at counts for the stretches around it too."""
        scope = _PeakScope(name)
        self._lap()
        self._open_scopes.append(scope)
        try:
            yield
        finally:
            self._lap()
            self._open_scopes.remove(scope)
            if scope.peak is not None:
                peaks[name] = max_memory(peaks.get(name), scope.peak)

    def _lap(self) -> Memory:
        lap = self.memory_meter.lap()
        for scope in self._open_scopes:
            scope.peak = max_memory(scope.peak, lap)
        return lap

    def _read_clock(self) -> float:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:  # after a fatal device error: the time is still worth having
                return time.perf_counter()
        return time.perf_counter()
