"""Figures that contradict arithmetic are told."""

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
from tests.unit.report.records import record


def timed(name: str, seconds: float, flops: int, device: str = "a CPU") -> RunRecord:
    """A run of five steps with a known median and known FLOPs."""
    speed = Throughput(
        steps=5,
        step_seconds_median=seconds,
        step_seconds_p10=seconds,
        step_seconds_p90=seconds,
        samples_per_second=1.0,
        data_time_fraction=0,
        tokens_per_second=TokensPerSecond(real=1, padded=1, labelled=1, virtual=0),
    )
    place = Device(type="cpu", name=device, num_processes=1)
    return record(
        name, "lora", 10, throughput=speed, flops=Flops(hardware_flops=flops, model_flops=flops), device=place
    )


def test_a_ratio_above_its_ceiling() -> None:
    """Twice the work in three times the time cannot be; the table says so."""
    records = [timed("full", 3.0, 200), timed("lora", 1.0, 100)]
    (sentence,) = check_step_times(records)
    assert "a step of full took 3.00 times as long as of lora and computed only 2.00 times as much" in sentence
    assert sentence in collect_notes(records)


@pytest.mark.parametrize("seconds", [1.0, 1.5, 2.0, 2.2])
def test_a_ratio_that_can_be(seconds: float) -> None:
    """Less than the ceiling is what optimizer and launches make of it, and a little more is noise."""
    assert list(check_step_times([timed("full", seconds, 200), timed("lora", 1.0, 100)])) == []


def test_more_work_in_less_time() -> None:
    """Less work cannot take longer than more, however much less it is; as long, it may: a launch costs what it does."""
    for flops in (201, 100, 10):
        (sentence,) = check_step_times([timed("full", 1.0, 200), timed("lora", 1.5, flops)])
        assert "a step of lora took 1.50 times as long" in sentence
    assert list(check_step_times([timed("full", 1.0, 200), timed("lora", 1.1, 10)])) == []


def test_one_sentence_a_slow_run() -> None:
    """Beside forty others it is told once, beside the one that shows it most, and how many more do."""
    others = [timed(f"r{i:02}", 1.0 + i / 1000, 100) for i in range(40)]
    (sentence,) = check_step_times([*others, timed("slow", 3.0, 100)])
    assert "a step of slow took 3.00 times as long as of r00" in sentence
    assert "(and likewise more than of 39 other runs)" in sentence
    (sentence,) = check_step_times([*others[:2], timed("slow", 3.0, 100)])
    assert "(and likewise more than of 1 other run)" in sentence


def test_a_step_of_no_time() -> None:
    """A clock that did not tick within a step says nothing, and nothing is divided by it."""
    assert list(check_step_times([timed("full", 1.0, 200), timed("lora", 0.0, 100)])) == []


@pytest.mark.parametrize("unlike", [{"seed": 1}, {"global_batch_size": 8}])
def test_other_batches_are_not_compared(unlike: dict[str, int]) -> None:
    """Rows of other lengths take another time: only the same steps say something of each other."""
    slow, fast = timed("full", 3.0, 200), timed("lora", 1.0, 100)
    other = fast.recipe | {"train": fast.recipe["train"] | unlike}
    assert list(check_step_times([slow, fast.model_copy(update={"recipe": other})])) == []
    assert list(check_step_times([slow, fast.model_copy(update={"steps": 6})])) == []
    assert len(list(check_step_times([slow, fast]))) == 1


def test_other_devices_are_not_compared() -> None:
    """Between machines there is no ceiling."""
    assert list(check_step_times([timed("full", 9.0, 200), timed("lora", 1.0, 100, device="another")])) == []


def test_what_is_not_known_is_not_judged() -> None:
    """Runs without figures are left out."""
    assert list(check_step_times([record("a", "full", 1), timed("lora", 1.0, 100)])) == []


def test_passes_are_judged_where_the_slower_trains_more() -> None:
    """Full fine-tuning has the larger optimizer, so forward and backward alone are held against their ceiling."""
    passes = {"part_seconds": {"forward": 0.4, "backward": 0.6}, "timed_steps": (2, 3, 4)}
    fast = timed("lora", 1.0, 100).model_copy(update=passes)
    for backward, said in ((2.2, 1), (1.6, 0)):
        slow = timed("full", 9.0, 200).model_copy(
            update={
                "parameters": ParameterCounts(total=1000, trainable=1000),
                "part_seconds": {"forward": 0.4, "backward": backward, "optimizer": 6.0},
                "timed_steps": (2, 3, 4),
            }
        )
        found = list(check_step_times([slow, fast]))
        assert len(found) == said
        assert not found or found[0].startswith("forward and backward of full took 2.60 times")
        two = [
            run.model_copy(update={"device": Device(type="cpu", name="a CPU", num_processes=2)}) for run in (slow, fast)
        ]
        assert list(check_step_times(two)) == []  # gradients are exchanged within the backward pass
        few = [run.model_copy(update={"timed_steps": (2, 3)}) for run in (slow, fast)]
        assert list(check_step_times(few)) == []  # two steps have no median
        assert list(check_step_times([slow, fast.model_copy(update={"timed_steps": (3, 4, 5)})])) == []


def test_who_trains_more_may_take_longer() -> None:
    """Optimizer and exchange of gradients are not in FLOPs: full fine-tuning is not accused."""
    slow = timed("full", 3.0, 200).model_copy(update={"parameters": ParameterCounts(total=1000, trainable=1000)})
    assert list(check_step_times([slow, timed("lora", 1.0, 100)])) == []


CARD = Device(type="cuda", name="a card", num_processes=1)
STATES = StateBytes(weights=100, gradients=20, optimizer=40)


def test_a_peak_below_what_must_be_held() -> None:
    """Weights, gradients and states lie in memory all at once when the optimizer steps."""
    low, enough = (
        record("a", "full", 1, device=CARD, state_bytes=STATES, memory={"train": Memory(allocated_bytes=peak)})
        for peak in (159, 160)
    )
    (sentence,) = check_record(low)
    assert "159 bytes, is below what it must have held: weights 100, gradients 20 and optimizer states 40" in sentence
    assert list(check_record(enough)) == []


def test_a_resident_peak_has_slack() -> None:
    """On CPU a process may have given back something it held at its baseline; more than that cannot be."""
    states = StateBytes(weights=RSS_SLACK_BYTES, gradients=10, optimizer=0)
    for peak, said in ((9, 1), (10, 0)):
        memory = Memory(rss_bytes=1000 + peak, baseline_rss_bytes=1000)
        assert len(list(check_record(record("a", "full", 1, state_bytes=states, memory={"train": memory})))) == said


def test_faster_than_the_device() -> None:
    """More FLOP/s than the data sheet has were not computed, or not in that time."""
    for executed, said in ((101.0, 1), (100.0, 0)):
        run = record("a", "full", 1, compute=Compute(hardware_flops_per_second=executed, peak_flops_per_second=100.0))
        assert len(list(check_record(run))) == said
    assert list(check_record(record("a", "full", 1, compute=Compute(hardware_flops_per_second=1e30)))) == []


def test_a_count_that_is_not_the_closed_form() -> None:
    """Where torch counts something else, the closed form misses something."""
    for closed_form, said in ((7, 1), (8, 0), (None, 0)):
        step = CountedStep(step=1, counted_flops=8, closed_form_flops=closed_form)
        assert len(list(check_record(record("a", "full", 1, flops=Flops(counted_step=step))))) == said
