"""The clock of all arms, called at the end of every step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from peftbench.profiler.memory import MemoryMeter
from peftbench.record import Memory


@dataclass
class StepClock:
    """Measures the seconds of the timed steps, including everything between them, and their peak memory.

    It synchronizes with the device after the untimed steps and after the last step; CUDA events time the steps between.
    """

    device: torch.device
    untimed_steps: int
    total: int
    meter: MemoryMeter | None = None
    """None if the arm has its own."""
    memory: Memory | None = None
    seconds: float = 0.0
    _ended: int = 0
    _marks: list[float | torch.cuda.Event] = field(default_factory=list)
    _start: float = 0.0

    def step_ended(self) -> None:
        """Record the end of an optimizer step."""
        self._ended += 1
        if self._ended == self.untimed_steps:
            self._wait()
            if self.meter is not None:
                self.meter.lap()
            self._start = time.perf_counter()
        if self._ended >= self.untimed_steps:
            self._marks.append(self._mark())
        if self._ended == self.total:
            self._wait()
            self.seconds = time.perf_counter() - self._start
            if self.meter is not None:
                self.memory = self.meter.lap()

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Return the seconds of each timed step."""
        return tuple(_between(first, second) for first, second in zip(self._marks, self._marks[1:], strict=False))

    def _mark(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first
    return float(first.elapsed_time(second)) / 1000
