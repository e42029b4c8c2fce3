"""Probe: the only owner of clocks, synchronisation and peak resets.

Three clocks are kept apart: each phase's, each step's, and what was paused and belongs to neither.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from peftbench.profiler.memory import larger, meter_for
from peftbench.record import Memory


@dataclass
class Probe:
    """Measures a run. The loop calls ``phase``, ``step`` and ``paused``, and never looks at a clock itself."""

    device: torch.device
    phase_seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)
    """Peaks of each phase."""
    current_phase: str | None = None
    _paused_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.meter = meter_for(self.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run; entered again, its seconds add up. What raises inside is measured until then."""
        outer, paused = self.current_phase, self._paused_seconds
        self.current_phase = name
        self.meter.start()
        start = self._now()
        try:
            yield
            self.current_phase = outer  # on an error the phase stays, so that the outcome can name it
        finally:
            seconds = self._now() - start - (self._paused_seconds - paused)
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
            self.memory[name] = larger(self.memory.get(name), self.meter.read())

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step; its end waits for the device."""
        paused = self._paused_seconds
        start = self._now()
        yield
        self.step_seconds.append(self._now() - start - (self._paused_seconds - paused))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Something that is neither part of the phase nor of the step around it."""
        start = self._now()
        try:
            yield
        finally:
            self._paused_seconds += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:  # after a fatal device error: the time is still worth having
                return time.perf_counter()
        return time.perf_counter()
