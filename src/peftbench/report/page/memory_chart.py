"""Rows and caption of the memory chart: each run's peak by category, and its limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftbench.common.units import parse_size
from peftbench.errors import BudgetError
from peftbench.record import RunRecord, train_peak_bytes
from peftbench.report.page.series import ChartRow
from peftbench.report.runs import run_label
from peftbench.report.text.memory_categories import MEMORY_CATEGORY_LABELS

MAX_LIMIT_RATIO = 4.0
"""Limits beyond this multiple of the longest bar are listed in the caption instead of drawn."""


def memory_bar_rows(records: Sequence[RunRecord]) -> list[ChartRow]:
    """Return each run's peak by category, in bytes and MiB."""
    return [
        {
            "run": run_label(record),
            "category": MEMORY_CATEGORY_LABELS[category],
            "order": list(MEMORY_CATEGORY_LABELS).index(category),
            "MiB": size / 2**20,
            "bytes": size,
        }
        for record in records
        for category, size in peak_by_category(record)
    ]


def peak_by_category(record: RunRecord) -> Iterator[tuple[str, int]]:
    """Yield category and bytes of the peak of training; "unattributed" is what no instrument could attribute.

    On a GPU: tensors, the allocator cache and the CUDA context. On CPU: the tensors of a breakdown, else the RSS above
    its value before anything was loaded. For a run out of memory: bytes in use and the requested allocation, as the
    budget counts them.
    """
    outcome, peak = record.outcome, train_peak_bytes(record)
    if outcome.kind == "oom":
        failure = {
            "in_use": outcome.in_use_bytes,
            "requested": outcome.requested_bytes,
            "cuda_context": record.cuda_context_bytes,
        }
        yield from ((category, size) for category, size in failure.items() if size)
        return
    if record.device.type == "cpu":
        yield from _cpu_peak_by_category(record, peak)
        return
    if peak is None:
        return
    known = _attributed_bytes(record, peak)
    yield from ((category, known[category]) for category in MEMORY_CATEGORY_LABELS if known.get(category))
    if (rest := peak - sum(known.values())) > 0:
        yield "unattributed", rest
    memory = record.memory.get("train")
    if memory is not None and memory.allocated_bytes is not None and memory.reserved_bytes is not None:
        if (cache := memory.reserved_bytes - memory.allocated_bytes) > 0:
            yield "allocator_cache", cache
        if record.cuda_context_bytes:
            yield "cuda_context", record.cuda_context_bytes


def _cpu_peak_by_category(record: RunRecord, peak: int | None) -> Iterator[tuple[str, int]]:
    """Yield what was measured: most of a process's memory is libraries and freed blocks, which no category has."""
    breakdown = record.memory_breakdown.bytes_by_category if record.memory_breakdown is not None else {}
    if breakdown:
        yield from ((category, breakdown[category]) for category in MEMORY_CATEGORY_LABELS if breakdown.get(category))
    elif peak is not None:
        yield "resident", peak


def _attributed_bytes(record: RunRecord, peak: int) -> dict[str, int]:
    """Return attributed bytes. A breakdown covers one untimed step, whose peak may exceed that of training."""
    states = record.state_bytes
    from_states = (
        {"weights": states.weights, "gradients": states.gradients, "optimizer_state": states.optimizer}
        if states is not None
        else {}
    )
    candidates = (record.memory_breakdown.bytes_by_category if record.memory_breakdown is not None else {}, from_states)
    return next((known for known in candidates if known and sum(known.values()) <= peak), {})


def find_memory_limit(record: RunRecord) -> tuple[str, int] | None:
    """Return the limit of a bar: the recipe's budget, else the GPU's memory; None if it is not comparable.

    On CPU the budget does not count file-backed pages, but RSS does. So only the bar of a run out of memory is
    comparable with the budget.
    """
    if record.device.type == "cpu" and record.outcome.kind != "oom":
        return None
    budget = (record.recipe.get("budget") or {}).get("memory")
    try:
        if budget is not None:
            return "budget", parse_size(str(budget))
    except BudgetError:  # a record edited by hand
        return None
    size = record.device.memory_bytes
    return None if size is None or record.device.type == "cpu" else ("device memory", size)


def memory_limit_rows(records: Sequence[RunRecord]) -> tuple[list[ChartRow], str]:
    """Return a row for each limit close enough to draw, and a sentence on the others."""
    longest = max((sum(size for _, size in peak_by_category(record)) for record in records), default=0)
    rows: list[ChartRow] = []
    far: dict[str, int] = {}
    for record in records:
        if (limit := find_memory_limit(record)) is None or not any(peak_by_category(record)):
            continue
        name, size = limit
        if size > MAX_LIMIT_RATIO * longest:
            far[name] = min(size, far.get(name, size))
        else:
            rows.append({"run": run_label(record), "limit_kind": name, "limit": size / 2**20})
    limits = " and ".join(f"the {name} of at least {size / 2**20:,.0f} MiB" for name, size in far.items())
    return rows, f"Not drawn, far beyond the bars: {limits}." if limits else ""


def memory_title(records: Sequence[RunRecord]) -> str:
    """Return the title of the chart: on CPU with breakdowns it shows tensors, and the table shows the process."""
    measured = [record for record in records if any(peak_by_category(record))]
    if measured and all(record.device.type == "cpu" and record.memory_breakdown for record in measured):
        return "Tensor memory of one training step"
    return "Peak memory by category"


def memory_caption(records: Sequence[RunRecord], limit_rows: Sequence[ChartRow], far_limits_note: str) -> str:
    """Return the caption of the chart for these records."""
    sentences = ["Peak memory of the training phase."]
    records = [record for record in records if record.tokens is not None]  # a baseline has no bar
    on_cpu = [record for record in records if record.device.type == "cpu"]
    on_gpu = [record for record in records if record.device.type != "cpu"]
    if any(record.memory_breakdown for record in on_gpu):
        sentences.append(
            "With profile.memory_breakdown, categories are of one untimed step of the first process; what training "
            "used in addition is unattributed."
        )
    if any(record.state_bytes and not record.memory_breakdown for record in on_gpu):
        subject = "Without it, weights" if any(record.memory_breakdown for record in on_gpu) else "Weights"
        sentences.append(f"{subject}, gradients and optimizer states are from tensor sizes; the rest is unattributed.")
    if any(record.memory_breakdown for record in on_cpu):
        sentences.append(
            "On CPU with profile.memory_breakdown, bars show tensors of one untimed step of the first process; the "
            "table has the resident memory, with libraries and freed blocks."
        )
    if any(not record.memory_breakdown for record in on_cpu):
        sentences.append(
            "On CPU without profile.memory_breakdown, bars show resident memory above its value before anything was "
            "loaded: tensors, libraries imported later and freed blocks that the C library keeps."
        )
    if on_cpu:
        sentences.append(
            "A budget does not count file-backed pages, so its limit is drawn only for runs out of memory."
        )
    if limit_rows:
        kinds = " or the ".join(dict.fromkeys(str(row["limit_kind"]) for row in limit_rows))
        sentences.append(f"The vertical line is the {kinds}.")
    return " ".join([*sentences, *([far_limits_note] if far_limits_note else [])])
