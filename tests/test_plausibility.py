"""Figures that contradict arithmetic are told."""

from __future__ import annotations

import pytest

from peftbench.plausibility import implausible
from peftbench.record import Device, Flops, Parameters, RunRecord, Throughput, TokensPerSecond
from peftbench.report.table import notes
from tests.report.records import record


def timed(name: str, seconds: float, flops: int, device: str = "a CPU") -> RunRecord:
    """A run of five steps with a known median and known FLOPs."""
    speed = Throughput(
        steps=5, step_seconds_median=seconds, step_seconds_p10=seconds, step_seconds_p90=seconds,
        samples_per_second=1.0, data_share=0,
        tokens_per_second=TokensPerSecond(real=1, padded=1, labelled=1, virtual=0),
    )  # fmt: skip
    place = Device(kind="cpu", name=device, processes=1)
    return record(name, "lora", 10, throughput=speed, flops=Flops(executed=flops, required=flops), device=place)


def test_a_ratio_above_its_ceiling() -> None:
    """Twice the work in three times the time cannot be; the table says so."""
    records = [timed("full", 3.0, 200), timed("lora", 1.0, 100)]
    (sentence,) = implausible(records)
    assert "a step of full took 3.00 times as long as one of lora and computed only 2.00 times as much" in sentence
    assert sentence in notes(records)


@pytest.mark.parametrize("seconds", [1.0, 1.5, 2.0, 2.2])
def test_a_ratio_that_can_be(seconds: float) -> None:
    """Less than the ceiling is what optimizer and launches make of it, and a little more is noise."""
    assert list(implausible([timed("full", seconds, 200), timed("lora", 1.0, 100)])) == []


def test_more_work_in_less_time() -> None:
    """Less work cannot take longer than more."""
    (sentence,) = implausible([timed("full", 1.0, 200), timed("lora", 1.5, 201)])
    assert "a step of lora took 1.50 times as long" in sentence


def test_other_devices_are_not_compared() -> None:
    """Between machines there is no ceiling."""
    assert list(implausible([timed("full", 9.0, 200), timed("lora", 1.0, 100, device="another")])) == []


def test_what_is_not_known_is_not_judged() -> None:
    """Runs without figures are left out."""
    assert list(implausible([record("a", "full", 1), timed("lora", 1.0, 100)])) == []


def test_who_trains_more_may_take_longer() -> None:
    """Optimizer and exchange of gradients are not in FLOPs: full fine-tuning is not accused."""
    slow = timed("full", 3.0, 200).model_copy(update={"parameters": Parameters(total=1000, trainable=1000)})
    assert list(implausible([slow, timed("lora", 1.0, 100)])) == []
