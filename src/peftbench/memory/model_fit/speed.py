"""Tokens per second of a plan, and the time and price of a number of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.memory.model_fit.answer import Speed
from peftbench.memory.model_fit.plan_points import MICRO_BATCHES_PER_STEP
from peftbench.profiler.peak_flops import get_peak_flops

if TYPE_CHECKING:
    from peftbench.memory.plan import Plan
    from peftbench.memory.search import MemoryTarget


@dataclass(frozen=True)
class Workload:
    """The examples whose time is asked for."""

    num_examples: int
    tokens_per_example: float
    price_per_hour: float | None = None
    """Price of one device per hour."""


def describe_speed(plan: Plan, target: MemoryTarget, precision: str, workload: Workload) -> Speed | None:
    """Return the speed of ``plan`` and the time of the workload; None if the device's FLOP/s are not known.

    The basis is the data sheet: FLOPs of the step divided by the device's peak, which no run exceeds.
    """
    peak = get_peak_flops(target.facts.torch_name, precision)
    if plan.step_flops is None or peak is None:
        return None
    tokens = plan.micro_batch_size * plan.sequence_length * MICRO_BATCHES_PER_STEP
    tokens_per_second = tokens / (plan.step_flops / peak) * plan.num_processes
    hours = workload.num_examples * workload.tokens_per_example / tokens_per_second / 3600
    price = None if workload.price_per_hour is None else hours * workload.price_per_hour * plan.num_processes
    return Speed(
        tokens_per_second=tokens_per_second,
        hours=hours,
        price=price,
        basis=f"FLOPs at the data sheet's {peak / 1e12:.4g} TFLOP/s in {precision}; no run is faster, most are slower",
        is_bound=True,
    )
