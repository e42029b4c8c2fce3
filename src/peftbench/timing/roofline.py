"""Predict the seconds of a step: the sum over its operations, each at the rate of its kind and size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peftbench.timing.operations import Operation
from peftbench.timing.prediction import StepTime
from peftbench.timing.speeds import DeviceSpeeds, SecondsRange


@dataclass(frozen=True)
class StepSize:
    """Examples and tokens of an optimizer step of all processes."""

    examples: int
    tokens: int


def predict_step_time(counts: Mapping[Operation, int], speeds: DeviceSpeeds, size: StepSize) -> StepTime:
    """Return the predicted time of a step of one process that runs ``counts``.

    The host dispatches every operation, views too. On a CPU this adds to the time of the operations. A GPU runs
    operations while the host dispatches later ones: at best the step takes the longer of both, at worst their sum.

    Raises:
        MissingSpeedError: the speeds do not cover an operation.
    """
    by_kind: dict[str, SecondsRange] = {}
    num_launches = 0
    for operation, count in counts.items():
        num_launches += count if operation.is_launched else 0
        if operation.kind != "metadata":
            low, high = speeds.estimate_operation(operation)
            before = by_kind.get(operation.kind, (0.0, 0.0))
            by_kind[operation.kind] = before[0] + count * low, before[1] + count * high
    launches = num_launches * speeds.launch_seconds[0], num_launches * speeds.launch_seconds[1]
    busy = sum(low for low, _ in by_kind.values()), sum(high for _, high in by_kind.values())
    shortest = max(busy[0], launches[0]) if speeds.overlaps_launches else busy[0] + launches[0]
    return StepTime(
        seconds=(shortest, busy[1] + launches[1]),
        seconds_by_kind={**by_kind, "launch": launches},
        tokens=size.tokens,
        examples=size.examples,
        basis=speeds.basis,
    )
