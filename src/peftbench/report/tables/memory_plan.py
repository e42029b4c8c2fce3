"""Text of memory plans and of fit results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from peftbench.memory.plan import Plan, UnplannedRun, get_comparable_costs
from peftbench.report.text.memory_categories import MEMORY_CATEGORY_LABELS

if TYPE_CHECKING:
    from peftbench.memory.plan import Fit, Verification

_MIB = 2**20


def format_plan(plan: Plan) -> str:
    """Return a table of the peaks of each phase by category, and the totals."""
    shown = [
        category
        for category in MEMORY_CATEGORY_LABELS
        if any(category in peak.live_bytes_by_category for peak in plan.phase_peaks.values())
    ]
    rows = [
        {
            "MiB at the peak of": name,
            **{MEMORY_CATEGORY_LABELS[key]: _format_mib(peak.live_bytes_by_category.get(key, 0)) for key in shown},
            "live": _format_mib(peak.live_bytes),
            "allocated": _format_mib(peak.allocated_bytes),
        }
        for name, peak in plan.phase_peaks.items()
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
        f"{plan.name}: {plan.gradient_accumulation_steps} micro-batches of {plan.micro_batch_size} x "
        f"{plan.sequence_length} tokens on {plan.device_name}{_engine_clause(plan)}",
        f"peak: {_format_mib(plan.peak.allocated_bytes)} MiB allocated in {plan.peak_phase}, at {plan.peak.operation}; "
        f"{_format_mib(plan.reserved_bytes)} MiB reserved",
        f"process: {_format_mib(low)} to {_format_mib(high)} MiB, including the context "
        f"({_format_range(plan.cuda_context_bytes)}) and library workspaces ({_format_range(plan.workspace_bytes)})",
    ]
    if plan.verdict is not None and plan.budget_bytes is not None and plan.margin_bytes is not None:
        lines.append(f"in {_format_mib(plan.budget_bytes)} MiB: {plan.verdict} ({_format_margin(*plan.margin_bytes)})")
    return "\n".join((*lines, *(f"note: {note}" for note in plan.notes)))


def format_plans(plans: Sequence[Plan | UnplannedRun]) -> str:
    """Return a table of a suite's peaks by category, and a note for each run without an estimate."""
    planned = [plan for plan in plans if isinstance(plan, Plan)]
    shown = [
        kind for kind in MEMORY_CATEGORY_LABELS if any(kind in plan.peak.live_bytes_by_category for plan in planned)
    ]
    rows = [
        {
            "MiB at its peak": plan.name,
            "in": plan.peak_phase,
            **{
                MEMORY_CATEGORY_LABELS[kind]: _format_mib(plan.peak.live_bytes_by_category.get(kind, 0))
                for kind in shown
            },
            "live": _format_mib(plan.peak.live_bytes),
            "reserved": _format_mib(plan.reserved_bytes),
            "process": f"{_format_mib(plan.process_bytes[0])} to {_format_mib(plan.process_bytes[1])}",
            **({f"in {_format_mib(plan.budget_bytes)} MiB": plan.verdict} if plan.budget_bytes is not None else {}),
        }
        for plan in planned
    ]
    notes = dict.fromkeys(note for plan in planned for note in plan.notes)
    unplanned = [f"{plan.name}: {plan.reason}" for plan in plans if isinstance(plan, UnplannedRun)]
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n".join((table, "", *(f"note: {note}" for note in (*unplanned, *notes))))


def format_fit(fit: Fit) -> str:
    """Return a table of the strategies that fit, fastest first by predicted time, and the overrides of the first."""
    if fit.models:
        return _format_models(fit)
    if not fit.strategies:
        return f"No strategy fits {_format_mib(fit.budget_bytes)} MiB: all were tried down to a micro-batch size of 1."
    costs = get_comparable_costs(fit.strategies)
    rows = [
        {
            "strategy": strategy.name,
            "micro-batch": strategy.plan.micro_batch_size,
            "allocated (MiB)": _format_mib(strategy.plan.peak.allocated_bytes),
            "process, at most (MiB)": _format_mib(strategy.plan.process_bytes[1]),
            "time": _format_ratio(cost, costs[0]),
            "trade-offs": "; ".join(strategy.tradeoffs) or "none",
        }
        for strategy, cost in zip(fit.strategies, costs, strict=True)
    ]
    best = fit.strategies[0]
    basis = "data sheet FLOP/s" if best.step_seconds else "FLOPs, ignoring their precision"
    return "\n".join(
        (
            tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True),
            "",
            f"time: predicted step time relative to the fastest, from {basis}",
            f"overrides of the first: {' '.join(best.overrides)}",
            *([_format_verification(fit.verification)] if fit.verification else []),
            *(f"note: {note}" for note in best.plan.notes),
        )
    )


def _format_models(fit: Fit) -> str:
    """Return a table of a family's models, from the largest to the first that fits."""
    rows = [
        {
            "model": model.name,
            "parameters": f"{model.parameters:,}",
            f"in {_format_mib(fit.budget_bytes)} MiB": "fits" if model.strategy else "does not fit",
            "overrides": " ".join(model.strategy.overrides) if model.strategy else "",
            "process, at most (MiB)": _format_mib(model.strategy.plan.process_bytes[1]) if model.strategy else "",
        }
        for model in fit.models
    ]
    notes = [f"note: {note}" for model in fit.models if model.strategy for note in model.strategy.plan.notes]
    return "\n".join((tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), "", *notes))


def _format_verification(verification: Verification) -> str:
    ran = "; ".join(
        f"{size} {'ran' if kind == 'ok' else 'ran out of memory'}"
        for size, kind in verification.outcome_by_micro_batch_size.items()
    )
    largest = verification.largest_micro_batch_size or "none"
    return (
        f"verified under the budget: micro-batch {ran}; predicted largest: {verification.predicted_micro_batch_size}, "
        f"measured largest: {largest}"
    )


def _format_range(sizes: tuple[int, int]) -> str:
    return f"{_format_mib(sizes[0])} to {_format_mib(sizes[1])}"


def _engine_clause(plan: Plan) -> str:
    return f", {plan.engine}, per process ({plan.num_processes} processes)" if plan.engine != "single" else ""


def _format_ratio(value: float | None, reference: float | None) -> str:
    return f"{value / reference:.2f}x" if value and reference else "unknown"


def _format_margin(low: int, high: int) -> str:
    if low >= 0:
        return f"{_format_mib(low)} to {_format_mib(high)} MiB to spare"
    if high < 0:
        return f"{_format_mib(-high)} to {_format_mib(-low)} MiB too much"
    return f"from {_format_mib(-low)} MiB too much to {_format_mib(high)} MiB to spare"


def _format_mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f}"
