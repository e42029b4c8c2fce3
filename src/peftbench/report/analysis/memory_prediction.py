"""Predicted memory next to measured memory, and the cards that a measured run fits in."""

from __future__ import annotations

from peftbench.memory.cards import CardSize, find_smallest_card, list_card_sizes
from peftbench.record import RunRecord


def get_predicted_bytes(record: RunRecord) -> int | None:
    """Return the predicted peak of the training: allocated on a GPU, live on CPU; None without a prediction."""
    predicted = record.plan.predicted if record.plan is not None else None
    if predicted is None:
        return None
    return predicted.allocated_bytes if record.device.type == "cuda" else predicted.live_bytes


def compute_predicted_ratio(record: RunRecord) -> float | None:
    """Return the predicted over the measured peak of the same rows; None if one of them is unknown.

    On a GPU both are bytes that the allocator gave out. On CPU both are live bytes of one step, which only a memory
    breakdown measures.
    """
    predicted, measured = get_predicted_bytes(record), _get_measured_bytes(record)
    return predicted / measured if predicted is not None and measured else None


def _get_measured_bytes(record: RunRecord) -> int | None:
    if record.device.type == "cuda":
        phases = [record.memory[name].allocated_bytes for name in ("warmup", "train") if name in record.memory]
        return max((size for size in phases if size is not None), default=None)
    predicted = record.plan.predicted if record.plan is not None else None
    breakdown = record.memory_breakdown
    if predicted is None or breakdown is None or predicted.step != breakdown.step:
        return None
    return breakdown.peak_bytes


def get_reserved_bytes(record: RunRecord) -> int | None:
    """Return the most bytes that the CUDA allocator reserved in any phase of a finished run; None on CPU."""
    if record.outcome.kind != "ok":
        return None
    return max((memory.reserved_bytes for memory in record.memory.values() if memory.reserved_bytes), default=None)


def find_card(record: RunRecord) -> CardSize | None:
    """Return the smallest known card that the measured run fits in; None if none is, or on CPU."""
    reserved = get_reserved_bytes(record)
    return None if reserved is None else find_smallest_card(reserved)


def format_card(record: RunRecord) -> str:
    """Return the memory of the smallest card that the run fits in, or that it needs more than the largest has."""
    if get_reserved_bytes(record) is None:
        return "–"
    card = find_card(record)
    return f"{card.gigabytes} GB" if card is not None else f"over {list_card_sizes()[-1].gigabytes} GB"
