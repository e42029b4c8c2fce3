"""Tokens per second of a plan, and the time and price of a number of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.memory.model_fit.answer import Speed

if TYPE_CHECKING:
    from peftbench.memory.plan import Plan


@dataclass(frozen=True)
class Workload:
    """The examples whose training time is predicted."""

    num_examples: int
    tokens_per_example: float
    price_per_hour: float | None = None
    """Price of one device per hour."""

    @property
    def tokens(self) -> float:
        """Tokens of all examples."""
        return self.num_examples * self.tokens_per_example


def describe_speed(plan: Plan, workload: Workload) -> Speed | None:
    """Return the predicted speed of ``plan`` and the time of the workload; None if the plan has no predicted time."""
    if plan.step_time is None:
        return None
    slowest, fastest = plan.step_time.tokens_per_second
    hours = (workload.tokens / fastest / 3600, workload.tokens / slowest / 3600)
    rate = None if workload.price_per_hour is None else workload.price_per_hour * plan.num_processes
    return Speed(
        tokens_per_second=(slowest, fastest),
        hours=hours,
        price=None if rate is None else (hours[0] * rate, hours[1] * rate),
        basis=plan.step_time.basis,
    )
