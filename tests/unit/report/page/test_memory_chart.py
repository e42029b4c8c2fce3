"""Rows of the memory chart, from records with known values and from committed records."""

from __future__ import annotations

import pytest

from peftbench.record import Device, Memory, MemoryBreakdown, Outcome, RunRecord, StateBytes, find_records
from peftbench.report.page import memory_chart
from tests.helpers.paths import REPOSITORY
from tests.unit.report.records import build_record

MIB = 2**20
GPU = Device(type="cuda", name="a GPU", num_processes=1, memory_bytes=300 * MIB)


def test_bar_categories_sum_to_the_peak() -> None:
    """Check that known categories and the rest sum to the training peak; a breakdown has more categories."""
    peak = {"train": Memory(allocated_bytes=100 * MIB)}
    states = StateBytes(weights=10 * MIB, gradients=10 * MIB, optimizer=20 * MIB)
    categories = {"weights": 10 * MIB, "activations": 55 * MIB, "logits": 0, "temporaries": 7}
    breakdown = MemoryBreakdown(
        step=5,
        micro_batch_size=1,
        sequence_length=8,
        peak_bytes=1,
        bytes_by_category=categories,
        operation="x",
        step_part="backward",
    )
    without_breakdown = build_record("a", "full", 1, memory=peak, state_bytes=states, device=GPU)
    rows = memory_chart.memory_bar_rows(
        [without_breakdown, without_breakdown.model_copy(update={"name": "b", "memory_breakdown": breakdown})]
    )
    for run in ("a (full)", "b (full)"):
        assert sum(int(row["bytes"] or 0) for row in rows if row["run"] == run) == 100 * MIB
    shown = [row["category"] for row in rows if row["run"] == "b (full)"]
    assert shown == ["weights", "activations", "temporaries", "unattributed"]
    assert [row["category"] for row in rows if row["run"] == "a (full)"] == [
        "weights",
        "gradients",
        "optimizer states",
        "unattributed",
    ]


def test_categories_that_exceed_the_training_peak_are_not_used() -> None:
    """Check the order: the breakdown, else the sizes of the states, else unattributed memory only.

    A breakdown covers an untimed step, whose peak may exceed that of training.
    """
    breakdown = MemoryBreakdown(
        step=5,
        micro_batch_size=1,
        sequence_length=8,
        peak_bytes=1,
        bytes_by_category={"weights": 9 * MIB},
        operation="x",
        step_part=None,
    )
    states = StateBytes(weights=4 * MIB, gradients=0, optimizer=0)
    run = build_record(
        "a",
        "full",
        1,
        memory={"train": Memory(allocated_bytes=5 * MIB)},
        memory_breakdown=breakdown,
        state_bytes=states,
        device=GPU,
    )
    assert dict(memory_chart.peak_by_category(run)) == {"weights": 4 * MIB, "unattributed": MIB}
    small_run = run.model_copy(update={"memory": {"train": Memory(allocated_bytes=3 * MIB)}})
    assert dict(memory_chart.peak_by_category(small_run)) == {"unattributed": 3 * MIB}


def test_cpu_bar_has_only_what_was_measured() -> None:
    """Check that it has the tensors of a breakdown, else the resident memory, and nothing unattributed."""
    cpu = Device(type="cpu", name="a CPU", num_processes=1)
    memory = {"train": Memory(rss_bytes=400 * MIB, baseline_rss_bytes=100 * MIB)}
    states = StateBytes(weights=4 * MIB, gradients=4 * MIB, optimizer=8 * MIB)
    run = build_record("a", "full", 1, memory=memory, state_bytes=states, device=cpu)
    assert dict(memory_chart.peak_by_category(run)) == {"resident": 300 * MIB}
    categories = {"activations": 55 * MIB, "weights": 10 * MIB, "logits": 0}
    breakdown = MemoryBreakdown(
        step=5,
        micro_batch_size=1,
        sequence_length=8,
        peak_bytes=65 * MIB,
        bytes_by_category=categories,
        operation="x",
        step_part="backward",
    )
    measured = run.model_copy(update={"memory_breakdown": breakdown})
    assert list(memory_chart.peak_by_category(measured)) == [("weights", 10 * MIB), ("activations", 55 * MIB)]


def test_gpu_bar_includes_allocator_cache_and_context() -> None:
    """Check that the bar has tensors, the allocator cache and the CUDA context, which a budget counts."""
    train = Memory(allocated_bytes=80 * MIB, reserved_bytes=90 * MIB)
    run = build_record("a", "full", 1, memory={"train": train}, cuda_context_bytes=30 * MIB, device=GPU)
    assert dict(memory_chart.peak_by_category(run)) == {
        "unattributed": 80 * MIB,
        "allocator_cache": 10 * MIB,
        "cuda_context": 30 * MIB,
    }


def test_bar_of_a_run_out_of_memory_has_bytes_in_use_and_requested() -> None:
    """Check that the bar is as long as the memory that was needed at the failure."""
    outcome = Outcome(kind="oom", step=1, in_use_bytes=90 * MIB, requested_bytes=30 * MIB)
    run = build_record("a", "full", 1, outcome=outcome, memory={"warmup": Memory(allocated_bytes=MIB)})
    assert [(row["category"], row["bytes"]) for row in memory_chart.memory_bar_rows([run])] == [
        ("in use at the failure", 90 * MIB),
        ("requested allocation", 30 * MIB),
    ]


def _record_with_limit(budget: str | None, device: Device, **changes: object) -> RunRecord:
    run = build_record("a", "full", 1, memory={"train": Memory(allocated_bytes=100 * MIB)}, device=device, **changes)
    return run.model_copy(update={"recipe": run.recipe | {"budget": {"memory": budget}}})


@pytest.mark.parametrize(
    ("run", "limit"),
    [
        (_record_with_limit("112MiB", GPU), ("budget", 112 * MIB)),
        (_record_with_limit(None, GPU), ("device memory", 300 * MIB)),
        (_record_with_limit("nonsense", GPU), None),
        (_record_with_limit("112MiB", Device(type="cpu", name="a CPU", num_processes=1)), None),
        (
            _record_with_limit(
                "112MiB",
                Device(type="cpu", name="a CPU", num_processes=1),
                outcome=Outcome(kind="oom", in_use_bytes=MIB),
            ),
            ("budget", 112 * MIB),
        ),
    ],
)
def test_memory_limit_is_comparable_with_the_bar(run: RunRecord, limit: tuple[str, int] | None) -> None:
    """Check that the limit is the budget, else the GPU's memory.

    On CPU, where bars are resident memory, only a run out of memory has a limit.
    """
    assert memory_chart.find_memory_limit(run) == limit


def test_far_limit_is_in_the_caption_and_not_drawn() -> None:
    """Check that a limit far beyond the longest bar is listed as text, and a near one is drawn."""
    far, near = _record_with_limit("80GiB", GPU), _record_with_limit("112MiB", GPU)
    rows, far_limits_note = memory_chart.memory_limit_rows([far, near.model_copy(update={"name": "b"})])
    assert [(row["run"], row["limit"]) for row in rows] == [("b (full)", 112.0)]
    assert "the budget of at least 81,920 MiB" in far_limits_note


COMMITTED = [
    run
    for folder in (REPOSITORY / "docs" / "results", *(REPOSITORY / "benchmarks").glob("*/records"))
    for run in find_records(folder).values()
]


def test_no_committed_ok_run_exceeds_its_limit() -> None:
    """Check all committed records, whose bars and limits must be comparable."""
    limited_runs = [
        run for run in COMMITTED if run.outcome.kind == "ok" and memory_chart.find_memory_limit(run) is not None
    ]
    assert len(COMMITTED) > 50
    for run in limited_runs:
        limit = memory_chart.find_memory_limit(run)
        assert limit is not None
        assert sum(size for _, size in memory_chart.peak_by_category(run)) <= limit[1], run.name


def test_caption_describes_the_bars_of_committed_records() -> None:
    """Check the sentences on CPU bars, breakdowns and sizes of tensors."""
    rows, far_limits_note = memory_chart.memory_limit_rows(COMMITTED)
    caption = memory_chart.memory_caption(COMMITTED, rows, far_limits_note)
    assert "On CPU" in caption
    assert "With profile.memory_breakdown, categories are of one untimed step" in caption
    states = StateBytes(weights=1, gradients=1, optimizer=1)
    states_caption = memory_chart.memory_caption([build_record("a", "full", 1, state_bytes=states, device=GPU)], [], "")
    assert states_caption.startswith("Peak memory of the training phase. Weights, gradients")
