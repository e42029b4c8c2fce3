"""Predict the seconds of a step: the sum over its operations, each at the rate of its kind and size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peftbench.timing.figures import Figures, SecondsRange
from peftbench.timing.operations import Operation
from peftbench.timing.prediction import StepTime


@dataclass(frozen=True)
class StepSize:
    """Examples and tokens of an optimizer step of all processes."""

    examples: int
    tokens: int


def predict_step_time(counts: Mapping[Operation, int], figures: Figures, size: StepSize) -> StepTime:
    """Return the predicted time of a step of one process that runs ``counts``.

    A GPU runs operations while the host launches later ones, so its step takes the longer of both. On a CPU the two
    add up.

    Raises:
        MissingFigureError: the figures do not cover an operation.
    """
    by_kind: dict[str, SecondsRange] = {}
    num_launches = 0
    for operation, count in counts.items():
        low, high = figures.estimate_operation(operation)
        before = by_kind.get(operation.kind, (0.0, 0.0))
        by_kind[operation.kind] = before[0] + count * low, before[1] + count * high
        num_launches += count * _is_launched(operation, overlaps_launches=figures.overlaps_launches)
    by_kind.pop("metadata", None)
    launches = num_launches * figures.launch_seconds[0], num_launches * figures.launch_seconds[1]
    busy = sum(low for low, _ in by_kind.values()), sum(high for _, high in by_kind.values())
    if figures.overlaps_launches:
        seconds = max(busy[0], launches[0]), max(busy[1], launches[1])
    else:
        seconds = busy[0] + launches[0], busy[1] + launches[1]
    return StepTime(
        seconds=seconds,
        seconds_by_kind={**by_kind, "launch": launches},
        tokens=size.tokens,
        examples=size.examples,
        basis=figures.basis,
    )


def _is_launched(operation: Operation, *, overlaps_launches: bool) -> bool:
    """True if it counts as a launch: a view launches nothing on a GPU, and takes about a dispatch on a CPU."""
    return operation.is_launched and not (overlaps_launches and operation.kind == "metadata")
