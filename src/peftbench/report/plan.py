"""A plan as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from peftbench.budget.plan import Plan

_MIB = 2**20
_KINDS = {
    "weights": "weights", "weight_copies": "autocast copies", "gradients": "gradients", "optimizer_state": "states",
    "activations": "activations", "logits": "logits", "temporaries": "temporaries",
}  # fmt: skip


def plan_text(plan: Plan) -> str:
    """A table of parts by kinds, and a sentence for each thing to know."""
    shown = [kind for kind in _KINDS if any(kind in part.live_by_kind for part in plan.parts.values())]
    rows = [
        {
            "MiB at the peak of": name,
            **{_KINDS[kind]: _mib(part.live_by_kind.get(kind, 0)) for kind in shown},
            "live": _mib(part.live_bytes),
            "allocated": _mib(part.allocated_bytes),
        }
        for name, part in plan.parts.items()
    ]
    low, high = plan.process_bytes
    lines = [
        tabulate(
            rows,
            headers="keys",
            tablefmt="github",
            disable_numparse=True,
            colalign=("left", *["right"] * (len(shown) + 2)),
        ),
        "",
        f"{plan.name}: {plan.micro_batches} micro-batches of {plan.rows} x {plan.width} tokens on {plan.device}",
        f"peak: {_mib(plan.peak.allocated_bytes)} MiB allocated in {plan.peak_part}, at {plan.peak.operation}; "
        f"{_mib(plan.reserved_bytes)} MiB reserved",
        f"process: {_mib(low)} to {_mib(high)} MiB, with the driver's context and the libraries' workspaces",
    ]
    if plan.verdict is not None and plan.budget_bytes is not None and plan.margin_bytes is not None:
        lines.append(f"in {_mib(plan.budget_bytes)} MiB: {plan.verdict} ({_margin(*plan.margin_bytes)})")
    return "\n".join((*lines, *(f"note: {note}" for note in plan.notes)))


def _margin(low: int, high: int) -> str:
    if low >= 0:
        return f"{_mib(low)} to {_mib(high)} MiB to spare"
    if high < 0:
        return f"{_mib(-high)} to {_mib(-low)} MiB too much"
    return f"from {_mib(-low)} MiB too much to {_mib(high)} MiB to spare"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f}"
