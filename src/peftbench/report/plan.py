"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from peftbench.budget.plan import NoPlan, Plan, times

if TYPE_CHECKING:
    from peftbench.budget.plan import Fit, Proof

_MIB = 2**20
_KINDS = {
    "weights": "weights", "gathered_weights": "gathered weights", "weight_copies": "autocast copies",
    "gradients": "gradients", "buckets": "buckets", "optimizer_state": "states",
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
        f"{plan.name}: {plan.micro_batches} micro-batches of {plan.rows} x {plan.width} tokens on {plan.device}"
        + _of_several(plan),
        f"peak: {_mib(plan.peak.allocated_bytes)} MiB allocated in {plan.peak_part}, at {plan.peak.operation}; "
        f"{_mib(plan.reserved_bytes)} MiB reserved",
        f"process: {_mib(low)} to {_mib(high)} MiB, with the context ({_range(plan.context_bytes)}) and the libraries' "
        f"workspaces ({_range(plan.workspaces_bytes)})",
    ]
    if plan.verdict is not None and plan.budget_bytes is not None and plan.margin_bytes is not None:
        lines.append(f"in {_mib(plan.budget_bytes)} MiB: {plan.verdict} ({_margin(*plan.margin_bytes)})")
    return "\n".join((*lines, *(f"note: {note}" for note in plan.notes)))


def plans_text(plans: Sequence[Plan | NoPlan]) -> str:
    """A table of a suite's runs by who holds their peaks, and a sentence for each that is not predicted."""
    made = [plan for plan in plans if isinstance(plan, Plan)]
    shown = [kind for kind in _KINDS if any(kind in plan.peak.live_by_kind for plan in made)]
    rows = [
        {
            "MiB at its peak": plan.name,
            "in": plan.peak_part,
            **{_KINDS[kind]: _mib(plan.peak.live_by_kind.get(kind, 0)) for kind in shown},
            "live": _mib(plan.peak.live_bytes),
            "reserved": _mib(plan.reserved_bytes),
            "process": f"{_mib(plan.process_bytes[0])} to {_mib(plan.process_bytes[1])}",
            **({f"in {_mib(plan.budget_bytes)} MiB": plan.verdict} if plan.budget_bytes is not None else {}),
        }
        for plan in made
    ]
    notes = dict.fromkeys(note for plan in made for note in plan.notes)
    left_out = [f"{plan.name}: {plan.reason}" for plan in plans if isinstance(plan, NoPlan)]
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n".join((table, "", *(f"note: {note}" for note in (*left_out, *notes))))


def fit_text(fit: Fit) -> str:
    """A table of what fits, the fastest by predicted time first, and how to run the first."""
    if fit.models:
        return _models_text(fit)
    if not fit.strategies:
        return f"nothing that was tried fits {_mib(fit.budget_bytes)} MiB, not even with micro-batches of one example"
    taken = times(fit.strategies)
    rows = [
        {
            "strategy": strategy.name,
            "micro-batch": strategy.plan.rows,
            "allocated, MiB": _mib(strategy.plan.peak.allocated_bytes),
            "process at most, MiB": _mib(strategy.plan.process_bytes[1]),
            "time": _times(seconds, taken[0]),
            "trades": "; ".join(strategy.trades) or "nothing",
        }
        for strategy, seconds in zip(fit.strategies, taken, strict=True)
    ]
    best = fit.strategies[0]
    by = "the data sheet's FLOP/s" if best.seconds else "FLOPs alone, whatever their precision"
    return "\n".join((
        tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), "",
        f"time: predicted of one step by {by}, of the fastest's",
        f"the first: {' '.join(best.changes)}",
        *([_proof_text(fit.proof)] if fit.proof else []),
        *(f"note: {note}" for note in best.plan.notes),
    ))  # fmt: skip


def _models_text(fit: Fit) -> str:
    """A table of a family's models, from the largest to the first that fits."""
    rows = [
        {
            "model": model.name,
            "parameters": f"{model.parameters:,}",
            f"in {_mib(fit.budget_bytes)} MiB": "fits" if model.strategy else "does not fit",
            "with": " ".join(model.strategy.changes) if model.strategy else "",
            "process at most, MiB": _mib(model.strategy.plan.process_bytes[1]) if model.strategy else "",
        }
        for model in fit.models
    ]
    notes = [f"note: {note}" for model in fit.models if model.strategy for note in model.strategy.plan.notes]
    return "\n".join((tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), "", *notes))


def _proof_text(proof: Proof) -> str:
    ran = "; ".join(f"{size} {'ran' if kind == 'ok' else 'was out of memory'}" for size, kind in proof.outcomes.items())
    found = f"{proof.largest} is the largest that runs" if proof.largest else "not even one example runs"
    return f"verified under the budget: micro-batch {ran}; predicted {proof.predicted}, and {found}"


def _range(sizes: tuple[int, int]) -> str:
    return f"{_mib(sizes[0])} to {_mib(sizes[1])}"


def _of_several(plan: Plan) -> str:
    return f", {plan.engine}, per process, of {plan.processes}" if plan.engine != "single" else ""


def _times(value: float | None, first: float | None) -> str:
    return f"{value / first:.2f}x" if value and first else "unknown"


def _margin(low: int, high: int) -> str:
    if low >= 0:
        return f"{_mib(low)} to {_mib(high)} MiB to spare"
    if high < 0:
        return f"{_mib(-high)} to {_mib(-low)} MiB too much"
    return f"from {_mib(-low)} MiB too much to {_mib(high)} MiB to spare"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f}"
