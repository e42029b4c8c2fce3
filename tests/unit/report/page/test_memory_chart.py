"""Where the memory went, from records with known figures and from real ones."""

from __future__ import annotations

import pytest

from peftbench.record import Device, Memory, MemoryBreakdown, Outcome, RunRecord, StateBytes, find_records
from peftbench.report.page import memory_chart
from tests.helpers.paths import REPOSITORY
from tests.unit.report.records import record

MIB = 2**20
GPU = Device(type="cuda", name="a GPU", num_processes=1, memory_bytes=300 * MIB)


def test_bars_add_up_to_the_peak() -> None:
    """Known parts and a rest make the peak of the training, to the last byte; a breakdown tells more parts apart."""
    peak = {"train": Memory(allocated_bytes=100 * MIB)}
    states = StateBytes(weights=10 * MIB, gradients=10 * MIB, optimizer=20 * MIB)
    kinds = {"weights": 10 * MIB, "activations": 55 * MIB, "logits": 0, "temporaries": 7}
    found = MemoryBreakdown(
        step=5,
        micro_batch_size=1,
        sequence_length=8,
        peak_bytes=1,
        bytes_by_category=kinds,
        operation="x",
        step_part="backward",
    )
    plain = record("a", "full", 1, memory=peak, state_bytes=states)
    rows = memory_chart.memory_bar_rows([plain, plain.model_copy(update={"name": "b", "memory_breakdown": found})])
    for run in ("a (full)", "b (full)"):
        assert sum(int(row["bytes"] or 0) for row in rows if row["run"] == run) == 100 * MIB
    parts = [row["category"] for row in rows if row["run"] == "b (full)"]
    assert parts == ["weights", "activations", "temporaries", "unattributed"]
    assert [row["category"] for row in rows if row["run"] == "a (full)"] == [
        "weights",
        "gradients",
        "optimizer states",
        "unattributed",
    ]


def test_a_warm_up_that_took_more_is_not_drawn_beyond_the_peak() -> None:
    """A breakdown of more than the training's peak gives way to the sizes of the states, and those to nothing."""
    found = MemoryBreakdown(
        step=5,
        micro_batch_size=1,
        sequence_length=8,
        peak_bytes=1,
        bytes_by_category={"weights": 9 * MIB},
        operation="x",
        step_part=None,
    )
    states = StateBytes(weights=4 * MIB, gradients=0, optimizer=0)
    one = record(
        "a", "full", 1, memory={"train": Memory(allocated_bytes=5 * MIB)}, memory_breakdown=found, state_bytes=states
    )
    assert dict(memory_chart.peak_by_category(one)) == {"weights": 4 * MIB, "unattributed": MIB}
    small = one.model_copy(update={"memory": {"train": Memory(allocated_bytes=3 * MIB)}})
    assert dict(memory_chart.peak_by_category(small)) == {"unattributed": 3 * MIB}


def test_a_gpu_bar_is_all_that_the_process_took() -> None:
    """Tensors, what the allocator kept beside them, and the context: what a budget is held against."""
    train = Memory(allocated_bytes=80 * MIB, reserved_bytes=90 * MIB)
    one = record("a", "full", 1, memory={"train": train}, cuda_context_bytes=30 * MIB, device=GPU)
    assert dict(memory_chart.peak_by_category(one)) == {
        "unattributed": 80 * MIB,
        "allocator_cache": 10 * MIB,
        "cuda_context": 30 * MIB,
    }


def test_an_out_of_memory_shows_what_it_held_and_asked_for() -> None:
    """Its bar is as long as what would have been needed at that moment."""
    outcome = Outcome(kind="oom", step=1, in_use_bytes=90 * MIB, requested_bytes=30 * MIB)
    one = record("a", "full", 1, outcome=outcome, memory={"warmup": Memory(allocated_bytes=MIB)})
    assert [(row["category"], row["bytes"]) for row in memory_chart.memory_bar_rows([one])] == [
        ("in use at the failure", 90 * MIB),
        ("requested allocation", 30 * MIB),
    ]


def _with(budget: str | None, device: Device, **changes: object) -> RunRecord:
    one = record("a", "full", 1, memory={"train": Memory(allocated_bytes=100 * MIB)}, device=device, **changes)
    return one.model_copy(update={"recipe": one.recipe | {"budget": {"memory": budget}}})


@pytest.mark.parametrize(
    ("one", "limit"),
    [
        (_with("112MiB", GPU), ("budget", 112 * MIB)),
        (_with(None, GPU), ("device memory", 300 * MIB)),
        (_with("nonsense", GPU), None),
        (_with("112MiB", Device(type="cpu", name="a CPU", num_processes=1)), None),
        (
            _with(
                "112MiB",
                Device(type="cpu", name="a CPU", num_processes=1),
                outcome=Outcome(kind="oom", in_use_bytes=MIB),
            ),
            ("budget", 112 * MIB),
        ),
    ],
)
def test_a_line_is_of_the_bars_own_measure(one: RunRecord, limit: tuple[str, int] | None) -> None:
    """The budget, else the GPU's memory; on a CPU, where bars are resident memory, only beside what was refused."""
    assert memory_chart.find_memory_limit(one) == limit


def test_a_line_far_away_is_told_and_not_drawn() -> None:
    """A line at a hundred times the longest bar would leave no bar to be seen; a near one beside it stays."""
    far, near = _with("80GiB", GPU), _with("112MiB", GPU)
    rows, told = memory_chart.memory_limit_rows([far, near.model_copy(update={"name": "b"})])
    assert [(row["run"], row["limit"]) for row in rows] == [("b (full)", 112.0)]
    assert "the budget of 81,920 MiB" in told


REAL = [
    one
    for folder in (REPOSITORY / "docs" / "results", *(REPOSITORY / "benchmarks").glob("*/records"))
    for one in find_records(folder).values()
]


def test_no_run_that_ended_well_passes_its_line() -> None:
    """Of all records that come with the project: the bar and the line are the same measure."""
    lined = [one for one in REAL if one.outcome.kind == "ok" and memory_chart.find_memory_limit(one) is not None]
    assert len(REAL) > 50
    for one in lined:
        limit = memory_chart.find_memory_limit(one)
        assert limit is not None
        assert sum(size for _, size in memory_chart.peak_by_category(one)) <= limit[1], one.name


def test_every_real_bar_has_a_caption() -> None:
    """What bars are is said for records of every kind of device that there are records of."""
    rows, far = memory_chart.memory_limit_rows(REAL)
    said = memory_chart.memory_caption(REAL, rows, far)
    assert "On CPU" in said
    assert "Without it, weights" in said
    plain = memory_chart.memory_caption(
        [record("a", "full", 1, state_bytes=StateBytes(weights=1, gradients=1, optimizer=1))], [], ""
    )
    assert plain.startswith("Peak memory of the training phase. Weights, gradients")
