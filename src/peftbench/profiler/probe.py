"""Probe: the only owner of clocks, device synchronization and peak resets.

It measures the time of each phase, of each step, and of pauses, which belong to neither.
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
    """A section whose peak is being measured; scopes can be nested."""

    name: str
    peak: Memory | None = None


@dataclass
class ExcludedSection:
    """A section that no measurement of the training includes."""

    seconds: float = 0.0
    """Duration, known after the section."""


@dataclass
class Probe:
    """Measures a run. The loop calls ``step``, ``part`` and ``paused``, and never reads a clock."""

    device: torch.device
    energy_meter: EnergyMeter = field(default_factory=NoEnergy)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    phase_joules: dict[str, float] = field(default_factory=dict)
    """Energy of each phase including pauses without excluded sections, if known."""
    step_seconds: list[float] = field(default_factory=list)
    timed_mask: list[bool] = field(default_factory=list)
    """True for each step that counts; warm-up steps do not."""
    memory: dict[str, Memory] = field(default_factory=dict)
    """Peaks of each phase."""
    step_memory: dict[str, Memory] = field(default_factory=dict)
    """Peaks of each part of the steps after warm-up, or of the warm-up if training ended in it. Empty if the device has
    no peaks per part."""
    current_phase: str | None = None
    current_step_part: str | None = None
    _excluded_joules: float = 0.0
    _paused_seconds: float = 0.0
    _is_paused: bool = False
    _phase_start: float = 0.0
    _paused_seconds_at_phase_start: float = 0.0
    _phase_joules_start: float | None = None
    _previous_step_memory: dict[str, Memory] = field(default_factory=dict)
    _untimed_steps_left: int = 0
    _training_stack: ExitStack = field(default_factory=ExitStack)
    _get_step_context: Callable[[int], AbstractContextManager[None] | None] = _no_step_context
    _step_part_seconds: dict[str, float] | None = None
    """Seconds of each part in a step whose parts are timed, None in other steps."""
    part_timed_steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds of each part by step number, for the warm-up steps whose parts were timed."""
    _open_scopes: list[_PeakScope] = field(default_factory=list)
    on_phase: Callable[[str], None] = _ignore_phase
    """Called with the name of each phase when it starts."""

    def __post_init__(self) -> None:
        self.memory_meter = build_memory_meter(self.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase of the run. Entered again, its seconds add up; on an error it is measured up to the error."""
        self.on_phase(name)
        outer, paused = self.current_phase, self._paused_seconds
        self.current_phase = name
        joules = self._phase_joules_start = self._read_joules()
        if outer is None and name != "train":  # the cache of earlier phases does not count here
            self.memory_meter.empty_cache()
        with self._record_peak(name, self.memory):
            start = self._phase_start = self._read_clock()
            self._paused_seconds_at_phase_start = paused
            try:
                yield
                self.current_phase = outer  # on an error the phase is kept, for the outcome
            finally:
                seconds = self._read_clock() - start - (self._paused_seconds - paused)
                self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
                if joules is not None and (now := self._read_joules()) is not None:
                    self.phase_joules[name] = self.phase_joules.get(name, 0.0) + now - joules
                memory = Memory(process_bytes=self.memory_meter.read_process_bytes())
                self.memory[name] = max_memory(self.memory.get(name), memory)

    @contextmanager
    def training(
        self,
        untimed_steps: int,
        get_step_context: Callable[[int], AbstractContextManager[None] | None] = _no_step_context,
    ) -> Iterator[None]:
        """Measure the training loop: its first ``untimed_steps`` are the phase ``warmup``, the rest ``train``.

        ``get_step_context`` receives the number of a warm-up step (from 1) and returns instruments for it, which may
        slow it down. The parts of a warm-up step without instruments are timed, except in step 1.
        """
        self._untimed_steps_left = untimed_steps
        self._get_step_context = get_step_context
        self.memory_meter.empty_cache()  # only here: training keeps what warm-up reserves
        self._previous_step_memory = dict(self.step_memory)  # of the training that this one resumes
        self.step_memory.clear()
        try:
            with self._training_stack:
                self._training_stack.enter_context(self.phase("warmup" if untimed_steps else "train"))
                yield
            if self._untimed_steps_left >= 0:  # an error keeps the peaks of the parts it ended in
                self._restore_step_memory()
        finally:
            if self._untimed_steps_left >= 0 and not any(self.timed_mask):  # no step of training was measured
                self.phase_seconds.pop("train", None)
                self.phase_joules.pop("train", None)
                self.memory.pop("train", None)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure one optimizer step; its end synchronizes the device."""
        number, warmup = len(self.step_seconds) + 1, self._untimed_steps_left > 0
        self._untimed_steps_left -= 1
        instruments = self._get_step_context(number) if warmup else None
        self._step_part_seconds = {} if warmup and instruments is None and number > 1 else None
        paused = self._paused_seconds
        start = self._read_clock()
        with instruments or nullcontext():
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
        """Measure a part of a step: ``forward``, ``backward`` or ``optimizer``.

        If the device supports it, its peak since the end of the previous part is recorded.
        """
        self.current_step_part = name
        start = self._read_clock() if self._step_part_seconds is not None else 0.0
        try:
            yield
            self.current_step_part = None  # on an error the part is kept, for the outcome
        finally:
            if self._step_part_seconds is not None:
                self._step_part_seconds[name] = self._step_part_seconds.get(name, 0.0) + self._read_clock() - start
            if self.memory_meter.supports_step_parts:
                self.step_memory[name] = max_memory(self.step_memory.get(name), self._lap())

    def _restore_step_memory(self) -> None:
        """Replace the peaks of warm-up steps with those of the steps before a resume."""
        self.step_memory.clear()
        self.step_memory.update(self._previous_step_memory)

    def state_dict(self) -> dict[str, Any]:
        """Return all measurements so far as plain values, for a run that resumes in another process."""
        seconds, joules, memory = dict(self.phase_seconds), dict(self.phase_joules), dict(self.memory)
        if (phase := self.current_phase) is not None:  # still running
            now = self._read_clock() - self._phase_start - (self._paused_seconds - self._paused_seconds_at_phase_start)
            seconds[phase] = seconds.get(phase, 0.0) + now
            if self._phase_joules_start is not None and (now_joules := self._read_joules()) is not None:
                joules[phase] = joules.get(phase, 0.0) + now_joules - self._phase_joules_start
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
        """Record measurements of phases that will not end regularly, without synchronizing the device."""
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
        """Exclude the memory of a section from all peaks, on CPU too, e.g. writing a checkpoint."""
        self._lap()
        try:
            yield
        finally:
            self.memory_meter.lap()

    @contextmanager
    def excluded(self, name: str) -> Iterator[ExcludedSection]:
        """Exclude a section in a pause from energy and memory peaks too, e.g. an evaluation between two steps.

        What the section adds to the allocator's cache is released after it. On an error the current phase is ``name``,
        for the outcome.
        """
        section, outer, joules = ExcludedSection(), self.current_phase, self.energy_meter.read_joules()
        start, in_use = self._read_clock(), self.memory_meter.read_in_use_bytes()
        with self.exclude_memory():
            self.current_phase = name
            yield section
            self.current_phase = outer
            if in_use is not None and (self.memory_meter.read_in_use_bytes() or 0) > in_use:
                self.memory_meter.empty_cache()
        section.seconds = self._read_clock() - start
        if joules is not None and (now := self.energy_meter.read_joules()) is not None:
            self._excluded_joules += now - joules

    def load_state_dict(self, state_dict: dict[str, Any], *, with_measurements: bool = True) -> None:
        """Add the measurements of the run that this process resumes: seconds and joules add up, peaks take the maximum.

        Without ``with_measurements`` (that run had other processes or settings), its steps are loaded as untimed ones.
        """
        if not with_measurements:
            self.step_seconds[:], self.timed_mask[:] = state_dict["step_seconds"], [False] * len(state_dict["timed"])
            return
        for own, key in ((self.phase_seconds, "phase_seconds"), (self.phase_joules, "phase_joules")):
            for name, value in state_dict[key].items():
                own[name] = own.get(name, 0.0) + value
        self.step_seconds[:], self.timed_mask[:] = state_dict["step_seconds"], state_dict["timed"]
        self.part_timed_steps.update({int(step): parts for step, parts in state_dict["timed_steps"].items()})
        for peaks, saved in ((self.memory, state_dict["memory"]), (self.step_memory, state_dict["step_memory"])):
            for name, memory in saved.items():
                peaks[name] = max_memory(peaks.get(name), Memory(**memory))

    def compute_step_part_seconds(self) -> dict[str, float]:
        """Return the median seconds of each part over the warm-up steps whose parts were timed."""
        timed = self.part_timed_steps.values()
        names = dict.fromkeys(name for parts in timed for name in parts)
        return {name: statistics.median(parts.get(name, 0.0) for parts in timed) for name in names}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a section between two steps from the time and the memory peak of the phase around it.

        Memory that the section keeps counts from then on, and so does freed memory that glibc keeps.
        """
        start = self._read_clock()
        self._lap(within_steps=True)
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self.memory_meter.lap(within_steps=True)
            self._paused_seconds += self._read_clock() - start

    @contextmanager
    def _record_peak(self, name: str, peaks: dict[str, Memory]) -> Iterator[None]:
        """Record the peak of a section, also on an error; it also counts in the enclosing sections."""
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

    def _lap(self, *, within_steps: bool = False) -> Memory:
        lap = self.memory_meter.lap(within_steps=within_steps)
        for scope in () if self._is_paused else self._open_scopes:
            scope.peak = max_memory(scope.peak, lap)
        return lap

    def _read_joules(self) -> float | None:
        """Return the joules so far without excluded sections, None if unknown."""
        joules = self.energy_meter.read_joules()
        return None if joules is None else joules - self._excluded_joules

    def _read_clock(self) -> float:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:  # after a fatal device error the time is still useful
                return time.perf_counter()
        return time.perf_counter()
