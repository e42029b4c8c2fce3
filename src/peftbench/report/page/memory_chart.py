"""Where the memory of each run's training went, by part, and the line that it had to stay below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftbench.common.units import parse_size
from peftbench.errors import BudgetError
from peftbench.record import RunRecord, train_peak_bytes
from peftbench.report.page.series import ChartRow
from peftbench.report.runs import run_label

CATEGORY_LABELS = {
    "weights": "weights",
    "gathered_weights": "gathered weights",
    "weight_copies": "autocast copies",
    "gradients": "gradients",
    "buckets": "buckets",
    "optimizer_state": "optimizer states",
    "activations": "activations",
    "logits": "logits",
    "temporaries": "temporaries",
    "unattributed": "unattributed",
    "allocator_cache": "allocator cache",
    "cuda_context": "CUDA context",
    "in_use": "in use at the failure",
    "requested": "requested allocation",
}
"""In the order in which they are stacked, and what the legend calls them."""

MAX_LIMIT_RATIO = 4.0
"""A line farther out than so many times the longest bar is told and not drawn, or no bar could be seen."""


def memory_bar_rows(records: Sequence[RunRecord]) -> list[ChartRow]:
    """Each run's parts, in bytes and MiB."""
    return [
        {
            "run": run_label(record),
            "category": CATEGORY_LABELS[category],
            "order": list(CATEGORY_LABELS).index(category),
            "MiB": size / 2**20,
            "bytes": size,
        }
        for record in records
        for category, size in peak_by_category(record)
    ]


def peak_by_category(record: RunRecord) -> Iterator[tuple[str, int]]:
    """What stood against the budget at the peak of the training, by part; "rest" is what no instrument told apart.

    On a GPU that is what the process took of it: tensors, what the allocator kept beside them, and the context. On a
    CPU it is resident memory beyond what was there before anything was loaded. Of a run that was out of memory it is
    what was held and what was asked for, as the budget counts it.
    """
    outcome, peak = record.outcome, train_peak_bytes(record)
    if outcome.kind == "oom":
        refused = {
            "in_use": outcome.in_use_bytes,
            "requested": outcome.requested_bytes,
            "cuda_context": record.cuda_context_bytes,
        }
        yield from ((part, size) for part, size in refused.items() if size)
        return
    if peak is None:
        return
    known = _attributed_bytes(record, peak)
    yield from ((part, known[part]) for part in CATEGORY_LABELS if known.get(part))
    if (rest := peak - sum(known.values())) > 0:
        yield "unattributed", rest
    memory = record.memory.get("train")
    if memory is not None and memory.allocated_bytes is not None and memory.reserved_bytes is not None:
        if (cache := memory.reserved_bytes - memory.allocated_bytes) > 0:
            yield "allocator_cache", cache
        if record.cuda_context_bytes:
            yield "cuda_context", record.cuda_context_bytes


def _attributed_bytes(record: RunRecord, peak: int) -> dict[str, int]:
    """Parts that were told apart. A breakdown is of a step of the warm-up, which may have taken more than training."""
    states = record.state_bytes
    by_size = (
        {"weights": states.weights, "gradients": states.gradients, "optimizer_state": states.optimizer}
        if states is not None
        else {}
    )
    told = (record.memory_breakdown.bytes_by_category if record.memory_breakdown is not None else {}, by_size)
    return next((known for known in told if known and sum(known.values()) <= peak), {})


def find_memory_limit(record: RunRecord) -> tuple[str, int] | None:
    """What the bar had to stay below: the recipe's budget, else the GPU's memory; None where it is measured otherwise.

    On a CPU a budget counts what a process may hold, and the bar is what is resident, pages of files too: only what was
    refused is in the budget's own measure.
    """
    if record.device.type == "cpu" and record.outcome.kind != "oom":
        return None
    asked = (record.recipe.get("budget") or {}).get("memory")
    try:
        if asked is not None:
            return "budget", parse_size(str(asked))
    except BudgetError:  # a record that was made by hand
        return None
    size = record.device.memory_bytes
    return None if size is None or record.device.type == "cpu" else ("device memory", size)


def memory_limit_rows(records: Sequence[RunRecord]) -> tuple[list[ChartRow], str]:
    """A line for each run that has one near enough, and a sentence on those that lie far beyond."""
    longest = max((sum(size for _, size in peak_by_category(record)) for record in records), default=0)
    rows: list[ChartRow] = []
    far: dict[str, int] = {}
    for record in records:
        if (found := find_memory_limit(record)) is None or not any(peak_by_category(record)):
            continue
        what, size = found
        if size > MAX_LIMIT_RATIO * longest:
            far[what] = min(size, far.get(what, size))
        else:
            rows.append({"run": run_label(record), "what": what, "limit": size / 2**20})
    told = " and ".join(f"the {what} of {size / 2**20:,.0f} MiB or more" for what, size in far.items())
    return rows, f"Not drawn, for it lies far beyond the right edge: {told}." if told else ""


def memory_caption(records: Sequence[RunRecord], limit_rows: Sequence[ChartRow], far_limits_note: str) -> str:
    """What the bars are, of these records."""
    said = ["Peak of the training phase."]
    if any(record.memory_breakdown for record in records):
        said.append(
            "Where a breakdown was asked for, parts are of one step of the warm-up in the first process, and what "
            "the training took beyond them is the rest."
        )
    if any(record.state_bytes and not record.memory_breakdown for record in records):
        before = "Without one, weights" if any(record.memory_breakdown for record in records) else "Weights"
        said.append(f"{before}, gradients and optimizer states are by their tensors' sizes, and the rest is not known.")
    if any(record.device.type == "cpu" for record in records):
        said.append(
            "On a CPU a bar is resident memory beyond what was there before anything was loaded, libraries' too. A "
            "budget does not count like that: its line stands only beside what was refused, in its own measure."
        )
    if limit_rows:
        whats = " or the ".join(dict.fromkeys(str(row["what"]) for row in limit_rows))
        said.append(f"The upright line is the {whats}.")
    return " ".join([*said, *([far_limits_note] if far_limits_note else [])])
