"""Measurements that contradict arithmetic are reported."""

from __future__ import annotations

import pytest

from peftbench.record import (
    Compute,
    CountedStep,
    Device,
    Flops,
    Memory,
    ParameterCounts,
    RunRecord,
    StateBytes,
    Throughput,
    TokensPerSecond,
)
from peftbench.record.sanity_checks import RSS_SLACK_BYTES, check_record, check_step_times
from peftbench.report.tables.table import collect_notes
from tests.unit.report.records import build_record


def timed(name: str, seconds: float, flops: int, device: str = "a CPU") -> RunRecord:
    """Return a run of five steps with the given median step time and FLOPs."""
    speed = Throughput(
        steps=5,
        step_seconds_median=seconds,
        step_seconds_p10=seconds,
        step_seconds_p90=seconds,
        samples_per_second=1.0,
        data_time_fraction=0,
        tokens_per_second=TokensPerSecond(real=1, padded=1, labeled=1, virtual=0),
    )
    cpu = Device(type="cpu", name=device, num_processes=1)
    return build_record(
        name, "lora", 10, throughput=speed, flops=Flops(hardware_flops=flops, model_flops=flops), device=cpu
    )


def test_time_ratio_above_flops_ratio_is_reported() -> None:
    """Three times the time for twice the FLOPs is reported, also below the table."""
    records = [timed("full", 3.0, 200), timed("lora", 1.0, 100)]
    (sentence,) = check_step_times(records)
    assert "a step of full took 3.00 times as long as one of lora with only 2.00 times the FLOPs" in sentence
    assert sentence in collect_notes(records)


@pytest.mark.parametrize("seconds", [1.0, 1.5, 2.0, 2.2])
def test_time_ratio_within_tolerance_is_not_reported(seconds: float) -> None:
    """Ratios below the FLOPs ratio, and up to 15 % above it, are plausible."""
    assert list(check_step_times([timed("full", seconds, 200), timed("lora", 1.0, 100)])) == []


def test_less_work_in_more_time_is_reported() -> None:
    """A step with fewer FLOPs must not take longer; equal time is plausible, because kernel launches dominate."""
    for flops in (201, 100, 10):
        (sentence,) = check_step_times([timed("full", 1.0, 200), timed("lora", 1.5, flops)])
        assert "a step of lora took 1.50 times as long" in sentence
    assert list(check_step_times([timed("full", 1.0, 200), timed("lora", 1.1, 10)])) == []


def test_slow_run_is_reported_once() -> None:
    """Among forty runs, one sentence names the fastest run and the number of others."""
    others = [timed(f"r{i:02}", 1.0 + i / 1000, 100) for i in range(40)]
    (sentence,) = check_step_times([*others, timed("slow", 3.0, 100)])
    assert "a step of slow took 3.00 times as long as one of r00" in sentence
    assert "(39 other runs show the same)" in sentence
    (sentence,) = check_step_times([*others[:2], timed("slow", 3.0, 100)])
    assert "(1 other run shows the same)" in sentence


def test_zero_step_time_is_ignored() -> None:
    """A step shorter than the clock's resolution is not compared."""
    assert list(check_step_times([timed("full", 1.0, 200), timed("lora", 0.0, 100)])) == []


@pytest.mark.parametrize("changed_keys", [{"seed": 1}, {"global_batch_size": 8}])
def test_different_batches_are_not_compared(changed_keys: dict[str, int]) -> None:
    """Only runs with the same batches are compared, because row lengths differ otherwise."""
    slow, fast = timed("full", 3.0, 200), timed("lora", 1.0, 100)
    other = fast.recipe | {"train": fast.recipe["train"] | changed_keys}
    assert list(check_step_times([slow, fast.model_copy(update={"recipe": other})])) == []
    assert list(check_step_times([slow, fast.model_copy(update={"steps": 6})])) == []
    assert len(list(check_step_times([slow, fast]))) == 1


def test_different_devices_are_not_compared() -> None:
    """Runs on different devices are not compared."""
    assert list(check_step_times([timed("full", 9.0, 200), timed("lora", 1.0, 100, device="another")])) == []


def test_runs_without_measurements_are_not_compared() -> None:
    """A run without throughput is skipped."""
    assert list(check_step_times([build_record("a", "full", 1), timed("lora", 1.0, 100)])) == []


def test_forward_backward_is_compared_if_slower_run_trains_more() -> None:
    """The optimizer of full fine-tuning is larger, so only forward and backward are compared."""
    passes = {"step_part_seconds": {"forward": 0.4, "backward": 0.6}, "part_timed_steps": (2, 3, 4)}
    fast = timed("lora", 1.0, 100).model_copy(update=passes)
    for backward, expected_count in ((2.2, 1), (1.6, 0)):
        slow = timed("full", 9.0, 200).model_copy(
            update={
                "parameters": ParameterCounts(total=1000, trainable=1000),
                "step_part_seconds": {"forward": 0.4, "backward": backward, "optimizer": 6.0},
                "part_timed_steps": (2, 3, 4),
            }
        )
        sentences = list(check_step_times([slow, fast]))
        assert len(sentences) == expected_count
        assert not sentences or sentences[0].startswith("forward and backward of full took 2.60 times")
        two = [
            run.model_copy(update={"device": Device(type="cpu", name="a CPU", num_processes=2)}) for run in (slow, fast)
        ]
        assert list(check_step_times(two)) == []  # the backward pass includes gradient reduction
        few = [run.model_copy(update={"part_timed_steps": (2, 3)}) for run in (slow, fast)]
        assert list(check_step_times(few)) == []  # too few steps
        assert list(check_step_times([slow, fast.model_copy(update={"part_timed_steps": (3, 4, 5)})])) == []


def test_run_with_more_trainable_parameters_may_be_slower() -> None:
    """Optimizer and gradient reduction are not in the FLOPs, so full fine-tuning is not reported."""
    slow = timed("full", 3.0, 200).model_copy(update={"parameters": ParameterCounts(total=1000, trainable=1000)})
    assert list(check_step_times([slow, timed("lora", 1.0, 100)])) == []


CARD = Device(type="cuda", name="a card", num_processes=1)
STATES = StateBytes(weights=100, gradients=20, optimizer=40)


def test_peak_below_state_bytes_is_reported() -> None:
    """Weights, gradients and states are in memory together at the optimizer step."""
    low, enough = (
        build_record("a", "full", 1, device=CARD, state_bytes=STATES, memory={"train": Memory(allocated_bytes=peak)})
        for peak in (159, 160)
    )
    (sentence,) = check_record(low)
    assert "159 bytes is below the bytes of weights (100), gradients (20) and optimizer states (40)" in sentence
    assert list(check_record(enough)) == []


def test_rss_peak_has_slack() -> None:
    """On CPU the RSS peak may be below the state bytes by at most the slack."""
    states = StateBytes(weights=RSS_SLACK_BYTES, gradients=10, optimizer=0)
    for peak, expected_count in ((9, 1), (10, 0)):
        memory = Memory(rss_bytes=1000 + peak, baseline_rss_bytes=1000)
        assert (
            len(list(check_record(build_record("a", "full", 1, state_bytes=states, memory={"train": memory}))))
            == expected_count
        )


def test_flops_above_device_peak_are_reported() -> None:
    """More FLOP/s than the data sheet peak is impossible."""
    for executed, expected_count in ((101.0, 1), (100.0, 0)):
        run = build_record(
            "a", "full", 1, compute=Compute(hardware_flops_per_second=executed, peak_flops_per_second=100.0)
        )
        assert len(list(check_record(run))) == expected_count
    assert list(check_record(build_record("a", "full", 1, compute=Compute(hardware_flops_per_second=1e30)))) == []


def test_counted_flops_must_equal_closed_form() -> None:
    """A difference between torch's count and the closed form is reported."""
    for closed_form, expected_count in ((7, 1), (8, 0), (None, 0)):
        step = CountedStep(step=1, counted_flops=8, closed_form_flops=closed_form)
        assert len(list(check_record(build_record("a", "full", 1, flops=Flops(counted_step=step))))) == expected_count
