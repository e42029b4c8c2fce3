"""What cannot be: figures of a table that contradict arithmetic, so that something was not measured as it should be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftbench.record import RunRecord, train_peak_bytes

TIME_RATIO_TOLERANCE = 1.15
"""How far above its ceiling a ratio of times may lie, for noise and for kernels that run at unlike speeds."""

MIN_PROFILED_STEPS = 3
"""How many steps' passes must have been timed for their median to say something."""

RSS_SLACK_BYTES = 64 * 2**20
"""Bytes: what a process on CPU may have given back since its baseline, and so may hold beside it unseen."""


def check_record(record: RunRecord) -> Iterator[str]:
    """A sentence for each figure of one run that cannot be, whatever it is compared with."""
    peak, states = train_peak_bytes(record), record.state_bytes
    slack = RSS_SLACK_BYTES if record.device.type == "cpu" else 0
    if peak is not None and states is not None and peak + slack < states.total:
        yield (
            f"the peak of the training, {peak:,} bytes, is below what it must have held: weights {states.weights:,}, "
            f"gradients {states.gradients:,} and optimizer states {states.optimizer:,}"
        )
    executed, able = record.compute.hardware_flops_per_second, record.compute.peak_flops_per_second
    if executed is not None and able is not None and executed > able:
        yield f"{executed:.3g} FLOP/s were computed on a device that by its data sheet can do {able:.3g}"
    step = record.flops.counted_step
    if step is not None and step.closed_form_flops is not None and step.counted_flops != step.closed_form_flops:
        yield (
            f"step {step.step} executed {step.counted_flops:,} FLOPs by torch's count and {step.closed_form_flops:,} in closed "
            "form, which misses something: the FLOPs of this run are not exact"
        )


def check_step_times(records: Sequence[RunRecord]) -> Iterator[str]:
    """A sentence for each run whose time differs from another's by more than what they computed does.

    On one device a step that computes a third of the FLOPs can hardly take less than a third of the time. What else a
    step does beside (the optimizer, the exchange of gradients) grows with the parameters trained, so where the slower
    run trains more of them its forward and backward passes alone are judged. A larger ratio speaks of another load on
    the machine, of time outside matrix products, or of an error. Only runs that were shown the same batches are paired,
    and passes only where the same steps of both were timed, at least ``TIMED_STEPS`` of them. The sentence names the
    run beside which it is the slowest, and how many more there are.
    """
    like: dict[str, list[_RunTiming]] = {}
    for record in records:
        if record.throughput and record.flops.hardware_flops and record.steps:
            like.setdefault(_build_comparison_key(record), []).append(_RunTiming.from_record(record))
    for group in like.values():
        for slow in group:
            beside = [(_compute_excess_ratio(slow, fast), fast) for fast in group if fast is not slow]
            worse = [(above, fast) for above, fast in beside if above > TIME_RATIO_TOLERANCE]
            if worse:
                yield _describe_slow_run(slow, max(worse, key=lambda one: one[0])[1], len(worse) - 1)


def _compute_excess_ratio(slow: _RunTiming, fast: _RunTiming) -> float:
    """How many times as long as its work allows the first took beside the second; 0 where that cannot be judged."""
    # Less work may take as long as more: a small kernel costs its launch.
    return _compute_time_ratio(slow, fast) / max(slow.flops_per_step / fast.flops_per_step, 1)


def _compute_time_ratio(slow: _RunTiming, fast: _RunTiming) -> float:
    """How many times as long the first took, in what is judged of the two; 0 where nothing is."""
    if slow.trainable_parameters > fast.trainable_parameters:
        return (
            slow.forward_backward_seconds / fast.forward_backward_seconds
            if fast.forward_backward_seconds and slow.timed_steps == fast.timed_steps
            else 0.0
        )
    return (
        slow.step_seconds / fast.step_seconds if fast.step_seconds else 0.0
    )  # a clock may not have ticked within a step


def _describe_slow_run(slow: _RunTiming, fast: _RunTiming, num_others: int) -> str:
    what = "forward and backward" if slow.trainable_parameters > fast.trainable_parameters else "a step"
    more = f" (and likewise more than of {num_others:,} other run{'s' * (num_others > 1)})" if num_others else ""
    return (
        f"{what} of {slow.name} took {_compute_time_ratio(slow, fast):.2f} times as long as of {fast.name} and computed only "
        f"{slow.flops_per_step / fast.flops_per_step:.2f} times as much{more}: either one of them was disturbed, or its time is not in "
        "matrix products (dropout and other element-wise work, on a CPU above all)"
    )


@dataclass(frozen=True)
class _RunTiming:
    """What is compared of a run that was timed; made once a run, since pairs are many."""

    name: str
    trainable_parameters: int
    timed_steps: tuple[int, ...]
    step_seconds: float
    forward_backward_seconds: float
    flops_per_step: float

    @classmethod
    def from_record(cls, record: RunRecord) -> _RunTiming:
        assert record.throughput is not None
        assert record.flops.hardware_flops is not None
        return cls(
            record.name,
            record.parameters.trainable if record.parameters else 0,
            record.part_timed_steps,
            record.throughput.step_seconds_median,
            _sum_forward_backward_seconds(record),
            record.flops.hardware_flops / record.steps,
        )


def _build_comparison_key(record: RunRecord) -> str:
    """On what a run was made and what it was shown, which must be the same for its times to be compared."""
    engine = record.engine.model_dump() if record.engine else None
    return json.dumps([record.device.model_dump(), engine, _list_batch_settings(record)], sort_keys=True)


def _sum_forward_backward_seconds(record: RunRecord) -> float:
    """Of the forward and backward pass alone, 0 where they are not known or exchange gradients between processes."""
    if record.device.num_processes > 1 or len(record.part_timed_steps) < MIN_PROFILED_STEPS:
        return 0.0
    return record.step_part_seconds.get("forward", 0.0) + record.step_part_seconds.get("backward", 0.0)


def _list_batch_settings(record: RunRecord) -> list[object]:
    """What decides which examples stand in which step."""
    train, data = record.recipe["train"], record.recipe["data"]
    return [
        record.data_fingerprint,
        record.steps,
        train["seed"],
        train["global_batch_size"],
        train.get("micro_batch_size"),
        data["seed"],
    ]
