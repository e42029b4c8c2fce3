"""Probe: the only owner of clocks, synchronisation and peak resets.

Three clocks are kept apart: each phase's, each step's, and what was paused and belongs to neither.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    _warmup_left: int = 0
    _training: ExitStack = field(default_factory=ExitStack)

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
    def training(self, warmup_steps: int) -> Iterator[None]:
        """The training loop: its first steps are the phase ``warmup``, in no other figure; the rest is ``train``."""
        self._warmup_left = warmup_steps
        try:
            with self._training:
                self._training.enter_context(self.phase("warmup" if warmup_steps else "train"))
                yield
        finally:
            if self._warmup_left >= 0:  # no step was timed: there is nothing to say of training
                self.phase_seconds.pop("train", None)
                self.memory.pop("train", None)

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step; its end waits for the device."""
        self._warmup_left -= 1
        paused = self._paused_seconds
        start = self._now()
        yield
        self.step_seconds.append(self._now() - start - (self._paused_seconds - paused))
        if self._warmup_left == 0:
            self._training.close()
            self._training.enter_context(self.phase("train"))

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
