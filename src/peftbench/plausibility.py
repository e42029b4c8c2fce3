"""What cannot be: figures of a table that contradict arithmetic, so that something was not measured as it should be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from peftbench.record import RunRecord, train_peak_bytes

TOLERANCE = 1.15
"""How far above its ceiling a ratio of times may lie, for noise and for kernels that run at unlike speeds."""

TIMED_STEPS = 3
"""How many steps' passes must have been timed for their median to say something."""

RESIDENT_SLACK = 64 * 2**20
"""Bytes: what a process on CPU may have given back since its baseline, and so may hold beside it unseen."""


def implausible_alone(record: RunRecord) -> Iterator[str]:
    """A sentence for each figure of one run that cannot be, whatever it is compared with."""
    peak, states = train_peak_bytes(record), record.state_bytes
    slack = RESIDENT_SLACK if record.device.kind == "cpu" else 0
    if peak is not None and states is not None and peak + slack < states.total:
        yield (
            f"the peak of the training, {peak:,} bytes, is below what it must have held: weights {states.weights:,}, "
            f"gradients {states.gradients:,} and optimizer states {states.optimizer:,}"
        )
    executed, able = record.compute.executed_per_second, record.compute.peak_per_second
    if executed is not None and able is not None and executed > able:
        yield f"{executed:.3g} FLOP/s were computed on a device that by its data sheet can do {able:.3g}"
    step = record.flops.counted_step
    if step is not None and step.closed_form is not None and step.counted != step.closed_form:
        yield (
            f"step {step.step} executed {step.counted:,} FLOPs by torch's count and {step.closed_form:,} in closed "
            "form, which misses something: the FLOPs of this run are not exact"
        )


def implausible(records: Sequence[RunRecord]) -> Iterator[str]:
    """A sentence for each pair of runs whose times differ by more than what they computed does.

    On one device a step that computes a third of the FLOPs can hardly take less than a third of the time. What else a
    step does beside (the optimizer, the exchange of gradients) grows with the parameters trained, so where the slower
    run trains more of them its forward and backward passes alone are judged. A larger ratio speaks of another load on
    the machine, of time outside matrix products, or of an error. Only runs that were shown the same batches are paired,
    and passes only where the same steps of both were timed, at least ``TIMED_STEPS`` of them.
    """
    timed = [r for r in records if r.throughput and r.flops.executed and r.steps]
    for slow, fast in itertools.permutations(timed, 2):
        if (slow.device, slow.engine, _batches(slow)) != (fast.device, fast.engine, _batches(fast)):
            continue
        more = _trained(slow) > _trained(fast)
        if more and slow.timed_steps != fast.timed_steps:
            continue
        seconds, what = (_passes_seconds, "forward and backward") if more else (_step_seconds, "a step")
        if not seconds(slow) or not seconds(fast):
            continue
        times = seconds(slow) / seconds(fast)
        ceiling = _step_flops(slow) / _step_flops(fast)
        # Less work may take as long as more: a small kernel costs its launch.
        if times > TOLERANCE * max(ceiling, 1):
            yield (
                f"{what} of {slow.name} took {times:.2f} times as long as of {fast.name} and computed only "
                f"{ceiling:.2f} times as much: either one of them was disturbed, or its time is not in matrix products "
                "(dropout and other element-wise work, on a CPU above all)"
            )


def _trained(record: RunRecord) -> int:
    return record.parameters.trainable if record.parameters else 0


def _passes_seconds(record: RunRecord) -> float:
    """Of the forward and backward pass alone, 0 where they are not known or exchange gradients between processes."""
    if record.device.processes > 1 or len(record.timed_steps) < TIMED_STEPS:
        return 0.0
    return record.part_seconds.get("forward", 0.0) + record.part_seconds.get("backward", 0.0)


def _batches(record: RunRecord) -> list[object]:
    """What decides which examples stand in which step."""
    train, data = record.recipe["train"], record.recipe["data"]
    return [
        record.data_identity, record.steps, train["seed"], train["global_batch"], train.get("micro_batch"),
        data["seed"],
    ]  # fmt: skip


def _step_seconds(record: RunRecord) -> float:
    assert record.throughput is not None
    return record.throughput.step_seconds_median


def _step_flops(record: RunRecord) -> float:
    assert record.flops.executed is not None
    return record.flops.executed / record.steps
