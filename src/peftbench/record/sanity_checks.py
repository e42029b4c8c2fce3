"""Sanity checks: sentences for measurements that contradict arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftbench.record import RunRecord, train_peak_bytes

TIME_RATIO_TOLERANCE = 1.15
"""Factor by which a time ratio may exceed its ceiling, for noise and for kernels of different efficiency."""

MIN_PROFILED_STEPS = 3
"""Least number of steps with timed parts for their median to be used."""

RSS_SLACK_BYTES = 64 * 2**20
"""Bytes that a process on CPU may have freed since its baseline, so that its peak can be lower by as much."""


def check_record(record: RunRecord) -> Iterator[str]:
    """Yield a sentence for each impossible measurement of one run."""
    peak, states = train_peak_bytes(record), record.state_bytes
    slack = RSS_SLACK_BYTES if record.device.type == "cpu" else 0
    if peak is not None and states is not None and peak + slack < states.total:
        yield (
            f"the training peak of {peak:,} bytes is below the bytes of weights ({states.weights:,}), "
            f"gradients ({states.gradients:,}) and optimizer states ({states.optimizer:,}) together"
        )
    hardware, device_peak = record.compute.hardware_flops_per_second, record.compute.peak_flops_per_second
    if hardware is not None and device_peak is not None and hardware > device_peak:
        yield f"{hardware:.3g} FLOP/s exceed the device's data sheet peak of {device_peak:.3g} FLOP/s"
    step = record.flops.counted_step
    if step is not None and step.closed_form_flops is not None and step.counted_flops != step.closed_form_flops:
        yield (
            f"step {step.step}: torch counted {step.counted_flops:,} FLOPs and the closed form gives "
            f"{step.closed_form_flops:,}, so the FLOPs of this run are not exact"
        )


def check_step_times(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield a sentence for each run whose steps are slower than another's by more than its extra FLOPs explain.

    On one device, a step with a third of the FLOPs can hardly take less than a third of the time. Other work of a step
    (optimizer, gradient reduction) grows with the trainable parameters. So if the slower run trains more parameters,
    only its forward and backward passes are compared. A larger ratio means that the machine had another load, that time
    went to work other than matrix products, or that a measurement is wrong. Only runs with the same batches are
    compared, and step parts only if the same steps were timed in both, at least ``MIN_PROFILED_STEPS`` of them. The
    sentence names the run with the largest ratio and the number of other such runs.
    """
    groups: dict[str, list[_RunTiming]] = {}
    for record in records:
        if record.throughput and record.flops.hardware_flops and record.steps:
            groups.setdefault(_build_comparison_key(record), []).append(_RunTiming.from_record(record))
    for group in groups.values():
        for slow in group:
            ratios = [(_compute_excess_ratio(slow, fast), fast) for fast in group if fast is not slow]
            exceeding = [(ratio, fast) for ratio, fast in ratios if ratio > TIME_RATIO_TOLERANCE]
            if exceeding:
                fastest = max(exceeding, key=lambda pair: pair[0])[1]
                yield _describe_slow_run(slow, fastest, len(exceeding) - 1)


def _compute_excess_ratio(slow: _RunTiming, fast: _RunTiming) -> float:
    """Return the time ratio over the FLOPs ratio; 0 if the times are not comparable."""
    # Less work may take the same time: a small kernel is bound by its launch.
    return _compute_time_ratio(slow, fast) / max(slow.flops_per_step / fast.flops_per_step, 1)


def _compute_time_ratio(slow: _RunTiming, fast: _RunTiming) -> float:
    """Return the ratio of the compared times; 0 if they are not comparable."""
    if slow.trainable_parameters > fast.trainable_parameters:
        comparable = fast.forward_backward_seconds and slow.timed_steps == fast.timed_steps
        return slow.forward_backward_seconds / fast.forward_backward_seconds if comparable else 0.0
    # A step may be shorter than the clock's resolution.
    return slow.step_seconds / fast.step_seconds if fast.step_seconds else 0.0


def _describe_slow_run(slow: _RunTiming, fast: _RunTiming, num_others: int) -> str:
    is_partial = slow.trainable_parameters > fast.trainable_parameters
    part, same = ("forward and backward", "those") if is_partial else ("a step", "one")
    plural = "s" * (num_others > 1)
    others = f" ({num_others:,} other run{plural} show{'s' * (num_others == 1)} the same)" if num_others else ""
    return (
        f"{part} of {slow.name} took {_compute_time_ratio(slow, fast):.2f} times as long as {same} of {fast.name} with "
        f"only {slow.flops_per_step / fast.flops_per_step:.2f} times the FLOPs{others}: either the machine had "
        "another load, or the time went to work other than matrix products (e.g. dropout on a CPU)"
    )


@dataclass(frozen=True)
class _RunTiming:
    """Times and FLOPs of one run that are compared; built once per run, because pairs are many."""

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
    """Return the device, engine and batch settings, which must be equal for times to be comparable."""
    engine = record.engine.model_dump() if record.engine else None
    return json.dumps([record.device.model_dump(), engine, _list_batch_settings(record)], sort_keys=True)


def _sum_forward_backward_seconds(record: RunRecord) -> float:
    """Return seconds of forward plus backward; 0 if unknown or if the backward pass includes gradient reduction."""
    if record.device.num_processes > 1 or len(record.part_timed_steps) < MIN_PROFILED_STEPS:
        return 0.0
    return record.step_part_seconds.get("forward", 0.0) + record.step_part_seconds.get("backward", 0.0)


def _list_batch_settings(record: RunRecord) -> list[object]:
    """Return the settings that decide which examples are in which step."""
    train, data = record.recipe["train"], record.recipe["data"]
    return [
        record.data_fingerprint,
        record.steps,
        train["seed"],
        train["global_batch_size"],
        train.get("micro_batch_size"),
        data["seed"],
    ]
