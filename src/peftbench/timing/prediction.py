"""The predicted time of an optimizer step. Imports neither torch nor the recipe, since reports use it too."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict


class StepTime(BaseModel):
    """Predicted seconds of one optimizer step: minimum and maximum, equal on a calibrated CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: tuple[float, float]
    seconds_by_kind: dict[str, tuple[float, float]]
    """Seconds of products, attention, elementwise operations, optimizer, exchange and launches, before overlap."""
    tokens: int
    """Real tokens of a step of all processes, with all rows of the planned length."""
    examples: int
    """Examples of a step of all processes."""
    basis: str
    """Source of the speeds, as a clause."""

    @property
    def typical_seconds(self) -> float:
        """The geometric mean of the range, for ratios and orders."""
        return math.sqrt(self.seconds[0] * self.seconds[1])

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Real tokens per second: minimum and maximum."""
        return self.tokens / self.seconds[1], self.tokens / self.seconds[0]


def hours_for(step_time: StepTime, examples: int, *, epochs: float = 1.0) -> tuple[float, float]:
    """Return the hours of training on ``examples`` for ``epochs``: minimum and maximum, without evaluation."""
    steps = math.ceil(examples * epochs / step_time.examples)
    return steps * step_time.seconds[0] / 3600, steps * step_time.seconds[1] / 3600
