"""Columns of predicted memory and of the card that a run fits in."""

from __future__ import annotations

from typing import Any

import pytest

from peftbench.memory.cards import list_card_sizes
from peftbench.memory.devices import load_devices
from peftbench.record import Device, Memory, MemoryBreakdown, Outcome, PlannedMemory, RecordedPlan, RunRecord
from peftbench.report.tables.columns import build_columns
from peftbench.report.tables.table import markdown_table, visible_columns
from tests.unit.report.records import build_record

MIB = 2**20
GPU = Device(type="cuda", name="a GPU", num_processes=1)


def build_plan(step: int | None = None, **changes: Any) -> RecordedPlan:
    """Return a plan with 90 MiB live and 100 MiB allocated."""
    values: dict[str, Any] = {
        "device_profile": "a GPU",
        "step": step,
        "micro_batch_size": 4,
        "sequence_length": 8,
        "labeled_tokens": 2,
        "measured_positions": 32,
        "peak_phase": "backward",
        "live_bytes": 90 * MIB,
        "allocated_bytes": 100 * MIB,
        "reserved_bytes": 120 * MIB,
        "process_bytes": (400 * MIB, 1500 * MIB),
    }
    return RecordedPlan(predicted=PlannedMemory(**values | changes))


def build_breakdown(step: int, peak_bytes: int) -> MemoryBreakdown:
    """Return a breakdown of a step with this peak."""
    return MemoryBreakdown(
        step=step,
        micro_batch_size=4,
        sequence_length=8,
        peak_bytes=peak_bytes,
        bytes_by_category={"weights": peak_bytes},
        operation="aten.mm",
        step_part="backward",
    )


def read_cells(record: RunRecord, title: str) -> tuple[str, dict[str, Any]]:
    """Return text and raw values of one column."""
    column = next(column for column in build_columns([record]) if column.title == title)
    return column.format_text(record), column.raw_values(record)


def test_gpu_run_compares_allocated_bytes() -> None:
    """The measured peak is the larger one of the timed and the untimed steps."""
    memory = {"warmup": Memory(allocated_bytes=125 * MIB), "train": Memory(allocated_bytes=80 * MIB)}
    record = build_record("r", "lora", 10, device=GPU, memory=memory, plan=build_plan())
    text, values = read_cells(record, "planned mem (MiB)")
    assert text == "100 (0.80x)"
    assert values["planned_bytes"] == 100 * MIB
    assert values["planned_over_measured"] == pytest.approx(0.8)
    assert values["planned_process_bytes_max"] == 1500 * MIB


@pytest.mark.parametrize(("planned_step", "text"), [(5, "90 (0.50x)"), (None, "90")])
def test_cpu_run_compares_live_bytes_of_the_same_step(planned_step: int | None, text: str) -> None:
    """A breakdown of other rows than the planned ones is not compared."""
    record = build_record(
        "r", "lora", 10, plan=build_plan(planned_step), memory_breakdown=build_breakdown(5, 180 * MIB)
    )
    assert read_cells(record, "planned mem (MiB)")[0] == text


def test_run_without_a_prediction_has_no_column() -> None:
    """Neither a record without a plan nor one with a reason has a value."""
    records = [build_record("old", "lora", 10), build_record("r", "lora", 10, plan=RecordedPlan(reason="bf16"))]
    assert not {"planned mem (MiB)", "fits in"} & {column.title for column in visible_columns(records)}


def test_smallest_card_has_room_for_the_largest_phase() -> None:
    """A card fits exactly as many reserved bytes as its allocator has; one byte more needs the next size."""
    small, large = list_card_sizes()[:2]
    for extra, expected in ((0, small), (1, large)):
        memory = {"train": Memory(reserved_bytes=MIB), "generate": Memory(reserved_bytes=small.tensor_bytes + extra)}
        record = build_record("r", "lora", 10, device=GPU, memory=memory)
        assert read_cells(record, "fits in") == (
            f"{expected.gigabytes} GB",
            {"fits_in_gigabytes": expected.gigabytes},
        )


def test_run_larger_than_all_cards_is_stated() -> None:
    """A run that needs more than the largest common card has no size in the CSV file."""
    largest = list_card_sizes()[-1]
    memory = {"train": Memory(reserved_bytes=largest.tensor_bytes + 1)}
    record = build_record("r", "lora", 10, device=GPU, memory=memory)
    assert read_cells(record, "fits in") == (f"over {largest.gigabytes} GB", {"fits_in_gigabytes": None})


def test_failed_run_and_cpu_run_name_no_card() -> None:
    """The need of a failed run was not measured, and a run on CPU has no allocator of a GPU."""
    memory = {"train": Memory(reserved_bytes=MIB)}
    failed = build_record("r", "lora", 10, device=GPU, memory=memory, outcome=Outcome(kind="oom", step=1))
    on_cpu = build_record("r", "lora", 10, memory={"train": Memory(rss_bytes=MIB)})
    assert [read_cells(record, "fits in")[0] for record in (failed, on_cpu)] == ["–", "–"]


def test_report_shows_prediction_and_card_of_each_run() -> None:
    """Both columns are in the Markdown table."""
    memory = {"train": Memory(allocated_bytes=100 * MIB, reserved_bytes=130 * MIB)}
    table = markdown_table([build_record("r", "lora", 10, device=GPU, memory=memory, plan=build_plan())])
    assert "100 (1.00x)" in table
    assert f"{list_card_sizes()[0].gigabytes} GB" in table


def test_card_sizes_are_those_of_the_profiles() -> None:
    """Each profile of a common card has at least as much memory for tensors as its size."""
    sizes = list_card_sizes()
    profiles = [facts for facts in load_devices().values() if facts.device_type == "cuda"]
    common = [facts for facts in profiles if facts.least_memory <= sizes[-1].gigabytes * 2**30]
    assert len(common) > len(sizes)
    for facts in common:
        size = next(size for size in sizes if facts.least_memory <= size.gigabytes * 2**30)
        assert facts.least_memory - int(facts.context[1]) - int(facts.workspaces[1]) >= size.tensor_bytes
