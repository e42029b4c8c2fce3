"""The arithmetic of predicted times on speeds with round numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peftbench.timing.data_sheet import (
    BANDWIDTH_EFFICIENCY,
    LAUNCH_SECONDS,
    PRODUCT_EFFICIENCY,
    DataSheetSpeeds,
)
from peftbench.timing.operations import Operation
from peftbench.timing.prediction import hours_for
from peftbench.timing.roofline import StepSize, predict_step_time
from peftbench.timing.speeds import AttentionPoint, MeasuredSpeeds, MissingSpeedError, ProductPoint, TrafficPoint

PRODUCT = Operation("forward", "product", "mm", "fp32", (1, 64, 64, 64), "nn", 2 * 64**3, 3 * 64**2 * 4)
ADD = Operation("forward", "elementwise", "add", "fp32", nbytes=4096)
ADAMW = Operation("optimizer", "optimizer", "_fused_adamw_", "fp32", nbytes=8192, is_launched=False)
VIEW = Operation("forward", "metadata", "view", "")
SIZE = StepSize(examples=8, tokens=800)


def build_speeds(**changes: Any) -> MeasuredSpeeds:
    """Return speeds of 1 GFLOP/s, 1 GB/s and 10 us a launch."""
    values: dict[str, Any] = {
        "machine": "a machine",
        "torch_version": "2.13.0",
        "num_threads": 1,
        "measured_at": "2026-12-01T00:00:00+00:00",
        "overlaps_launches": False,
        "products": (ProductPoint(dims=(1, 64, 64, 64), layout="nn", dtype="fp32", seconds=2 * 64**3 / 1e9),),
        "attention": (
            AttentionPoint(dims=(8, 64, 64, 16), direction="forward", dtype="fp32", flops=10**6, seconds=1e-3),
        ),
        "traffic": tuple(
            TrafficPoint(kernel_class=kernel_class, dtype="fp32", nbytes=nbytes, seconds=nbytes / 1e9)
            for kernel_class in ("arithmetic", "adamw")
            for nbytes in (1024, 4096)
        ),
        "seconds_per_launch": 1e-5,
    }
    return MeasuredSpeeds(**{**values, **changes})


def test_step_on_a_cpu_is_the_sum_of_its_operations_and_launches() -> None:
    """Views are dispatched too; a tensor of a list is not launched."""
    time = predict_step_time({PRODUCT: 3, ADD: 2, ADAMW: 1, VIEW: 4}, build_speeds(), SIZE)
    expected = 3 * 2 * 64**3 / 1e9 + 2 * 4096 / 1e9 + 8192 / 1e9 + 9 * 1e-5
    assert list(time.seconds) == pytest.approx([expected, expected])
    assert list(time.seconds_by_kind["launch"]) == pytest.approx([9e-5, 9e-5])
    assert list(time.tokens_per_second) == pytest.approx([800 / expected, 800 / expected])


def test_step_on_a_gpu_ranges_from_full_overlap_to_none() -> None:
    """At best the longer of operations and launches, at worst their sum."""
    time = predict_step_time({PRODUCT: 3, VIEW: 100}, build_speeds(overlaps_launches=True), SIZE)
    operations, launches = 3 * 2 * 64**3 / 1e9, 103 * 1e-5
    assert list(time.seconds) == pytest.approx([max(operations, launches), operations + launches])


def test_data_sheet_takes_the_longer_of_arithmetic_and_memory() -> None:
    """A large product is limited by FLOP/s, a copy by bandwidth; both as ranges."""
    speeds = DataSheetSpeeds("NVIDIA H200", 4.8e12)
    large = PRODUCT._replace(dtype="bf16", flops=10**12, nbytes=10**6)
    assert speeds.estimate_operation(large) == pytest.approx(
        tuple(10**12 / (989.4e12 * share) for share in reversed(PRODUCT_EFFICIENCY))
    )
    assert speeds.estimate_operation(ADD._replace(nbytes=10**9)) == pytest.approx(
        tuple(10**9 / (4.8e12 * share) for share in reversed(BANDWIDTH_EFFICIENCY))
    )
    assert predict_step_time({VIEW: 1}, speeds, SIZE).seconds == LAUNCH_SECONDS


def test_data_sheet_without_the_type_of_a_product() -> None:
    """A T4 has no bf16."""
    speeds = DataSheetSpeeds("Tesla T4", 0.32e12)
    with pytest.raises(MissingSpeedError, match="Tesla T4 in bf16"):
        speeds.estimate_operation(PRODUCT._replace(dtype="bf16"))


def test_measured_shape_has_its_measured_rate() -> None:
    """The nearest point dominates, and a point of another layout counts as farther away."""
    slow = ProductPoint(dims=(1, 64, 64, 64), layout="nt", dtype="fp32", seconds=2 * 64**3 / 1e8)
    speeds = build_speeds(products=(*build_speeds().products, slow))
    seconds, _ = speeds.estimate_operation(PRODUCT)
    assert seconds == pytest.approx(2 * 64**3 / 1e9, rel=0.01)
    seconds, _ = speeds.estimate_operation(PRODUCT._replace(layout="nt"))
    assert seconds == pytest.approx(2 * 64**3 / 1e8, rel=0.01)


def test_shape_between_two_points_has_a_rate_between() -> None:
    """The geometric mean of both rates in the middle; the larger one's rate beyond."""
    points = tuple(
        ProductPoint(dims=(1, m, 64, 64), layout="nn", dtype="fp32", seconds=2 * m * 64**2 / rate)
        for m, rate in ((16, 1e8), (256, 1e10))
    )
    speeds = build_speeds(products=points)
    middle = PRODUCT._replace(dims=(1, 64, 64, 64))
    assert middle.flops / speeds.estimate_operation(middle)[0] == pytest.approx(1e9)
    beyond = PRODUCT._replace(dims=(1, 4096, 64, 64))
    assert beyond.flops / speeds.estimate_operation(beyond)[0] == pytest.approx(1e10, rel=0.01)


def test_bytes_between_two_points_are_interpolated() -> None:
    """Linear in log-log; below the smallest and above the largest point at their rates."""
    speeds = build_speeds(
        traffic=(
            TrafficPoint(kernel_class="arithmetic", dtype="fp32", nbytes=1024, seconds=1e-6),
            TrafficPoint(kernel_class="arithmetic", dtype="fp32", nbytes=4096, seconds=16e-6),
        )
    )
    seconds = [speeds.estimate_operation(ADD._replace(nbytes=nbytes))[0] for nbytes in (512, 2048, 8192)]
    assert seconds == pytest.approx([0.5e-6, 4e-6, 32e-6])


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (PRODUCT._replace(dtype="fp16"), "products in fp16"),
        (ADD._replace(name="gelu"), "the class activation"),
        (Operation("backward", "exchange", "allreduce_", "", nbytes=8), "between processes"),
    ],
)
def test_missing_speeds_are_named(operation: Operation, reason: str) -> None:
    """No other speed takes their place."""
    with pytest.raises(MissingSpeedError, match=reason):
        build_speeds().estimate_operation(operation)


def test_exchange_takes_its_bytes_at_the_links_speed() -> None:
    """8 bytes at 2 bytes a second."""
    operation = Operation("backward", "exchange", "allreduce_", "", nbytes=8)
    assert build_speeds(link_bytes_per_second=2.0).estimate_operation(operation) == (4.0, 4.0)


def test_hours_of_a_training() -> None:
    """A last, smaller step takes as long as a whole one."""
    time = predict_step_time({PRODUCT: 1}, build_speeds(), SIZE)
    low, high = hours_for(time, examples=81, epochs=2)
    assert low == high == pytest.approx(math.ceil(162 / 8) * time.seconds[0] / 3600)
