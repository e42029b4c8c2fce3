"""Text of memory plans and of fit results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tabulate import tabulate

from peftbench.memory.plan import Plan, UnplannedRun, get_comparable_costs
from peftbench.report.text.memory_categories import MEMORY_CATEGORY_LABELS

if TYPE_CHECKING:
    from peftbench.memory.plan import Fit, RowLimit, Strategy, Verification
    from peftbench.timing.prediction import StepTime

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class _Unit:
    """The unit of all sizes of one text."""

    name: str
    num_bytes: int
    decimals: int

    @classmethod
    def for_sizes(cls, sizes: Iterable[int]) -> _Unit:
        """Return MiB, or GiB if a size has at least 10 GiB."""
        return cls("GiB", _GIB, 2) if max(sizes, default=0) >= 10 * _GIB else cls("MiB", _MIB, 0)

    def format(self, size: int) -> str:
        """Return the size without the unit's name."""
        return f"{size / self.num_bytes:,.{self.decimals}f}"

    def with_name(self, size: int) -> str:
        """Return the size with the unit's name, e.g. "14.56 GiB"."""
        return f"{self.format(size)} {self.name}"

    def format_range(self, sizes: tuple[int, int]) -> str:
        """Return the minimum and maximum."""
        return f"{self.format(sizes[0])} to {self.format(sizes[1])}"


def format_plan(plan: Plan) -> str:
    """Return a table of the peaks of each phase by category, and the totals."""
    unit, budget_unit = _Unit.for_sizes([plan.process_bytes[1]]), _Unit.for_sizes([plan.budget_bytes or 0])
    shown = [
        category
        for category in MEMORY_CATEGORY_LABELS
        if any(category in peak.live_bytes_by_category for peak in plan.phase_peaks.values())
    ]
    rows = [
        {
            f"{unit.name} at the peak of": name,
            **{MEMORY_CATEGORY_LABELS[key]: unit.format(peak.live_bytes_by_category.get(key, 0)) for key in shown},
            "live": unit.format(peak.live_bytes),
            "allocated": unit.format(peak.allocated_bytes),
        }
        for name, peak in plan.phase_peaks.items()
    ]
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
        f"peak: {unit.with_name(plan.peak.allocated_bytes)} allocated in {plan.peak_phase}, at {plan.peak.operation}; "
        f"{unit.with_name(plan.reserved_bytes)} reserved",
        *_format_process_lines(plan, unit),
    ]
    if plan.step_time is not None:
        lines.append(_format_step_time(plan.step_time))
    if plan.verdict is not None and plan.budget_bytes is not None and plan.margin_bytes is not None:
        margin = _format_margin(*plan.margin_bytes, _Unit.for_sizes([max(map(abs, plan.margin_bytes))]))
        lines.append(f"in {budget_unit.with_name(plan.budget_bytes)}: {plan.verdict} ({margin})")
    if plan.longest_rows is not None:
        lines.append(_format_longest_rows(plan.longest_rows, plan))
    if plan.suggestion is not None:
        lines.append(f"suggestion: {plan.suggestion}")
    return "\n".join((*lines, *(f"note: {note}" for note in plan.notes)))


def _format_longest_rows(limit: RowLimit, plan: Plan) -> str:
    """Return the longest rows that fit at the plan's micro-batch."""
    reason = "all that the model has positions for" if limit.is_model_limit else "longer rows were not found to fit"
    return f"longest rows at micro-batches of {plan.micro_batch_size}: data.max_length={limit.tokens} fits ({reason})"


def _format_step_time(step_time: StepTime) -> str:
    """Return seconds and tokens per second of a step, as ranges unless both ends are equal."""
    seconds = _format_value_range(*step_time.seconds)
    tokens = _format_value_range(*step_time.tokens_per_second)
    return f"time: {seconds} s per step, {tokens} tokens/s ({step_time.basis})"


def _format_value_range(low: float, high: float) -> str:
    """Return both ends with two significant digits, or one value with three."""
    return _round(low, 3) if low == high else f"{_round(low)} to {_round(high)}"


def _round(value: float, digits: int = 2) -> str:
    """Return a value with this many significant digits, without an exponent."""
    decimals = digits - 1 - math.floor(math.log10(value))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def _format_process_lines(plan: Plan, unit: _Unit) -> list[str]:
    """Return what the process needs: on a GPU its device memory; on CPU without and with Python and its libraries."""
    low, high = plan.process_bytes
    total, workspaces = (
        f"process: {unit.format(low)} to {unit.with_name(high)}",
        unit.format_range(plan.workspace_bytes),
    )
    if plan.resident_bytes is None:
        context = unit.format_range(plan.cuda_context_bytes)
        return [f"{total}, including the context ({context}) and library workspaces ({workspaces})"]
    least, most = plan.resident_bytes
    resident_unit, container = _Unit.for_sizes([most]), most * plan.num_processes
    limit = _Unit.for_sizes([container]).with_name(container)
    return [
        f"{total}, including library workspaces ({workspaces}) but not Python and its libraries; "
        "this is what budget.memory limits",
        f"resident: {resident_unit.format(least)} to {resident_unit.with_name(most)}, with Python, libraries and freed "
        f"blocks that the C library keeps; set a container's limit to {limit}",
    ]


def format_plans(plans: Sequence[Plan | UnplannedRun]) -> str:
    """Return a table of a suite's peaks by category, and a note for each run without an estimate."""
    planned = [plan for plan in plans if isinstance(plan, Plan)]
    unit = _Unit.for_sizes([size for plan in planned for size in (plan.process_bytes[1], plan.budget_bytes or 0)])
    shown = [
        kind for kind in MEMORY_CATEGORY_LABELS if any(kind in plan.peak.live_bytes_by_category for plan in planned)
    ]
    rows = [
        {
            f"{unit.name} at its peak": plan.name,
            "in": plan.peak_phase,
            **{
                MEMORY_CATEGORY_LABELS[kind]: unit.format(plan.peak.live_bytes_by_category.get(kind, 0))
                for kind in shown
            },
            "live": unit.format(plan.peak.live_bytes),
            "reserved": unit.format(plan.reserved_bytes),
            "process": f"{unit.format(plan.process_bytes[0])} to {unit.format(plan.process_bytes[1])}",
            **({f"in {unit.with_name(plan.budget_bytes)}": plan.verdict} if plan.budget_bytes is not None else {}),
        }
        for plan in planned
    ]
    notes = dict.fromkeys(note for plan in planned for note in plan.notes)
    if any(plan.verdict == "does not fit" for plan in planned):
        notes["peftbench estimate RECIPE.yaml suggests the cheapest change with which a recipe fits"] = None
    unplanned = [f"{plan.name}: {plan.reason}" for plan in plans if isinstance(plan, UnplannedRun)]
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n".join((table, "", *(f"note: {note}" for note in (*unplanned, *notes))))


def format_fit(fit: Fit) -> str:
    """Return a table of the strategies that fit, fastest first by predicted time, and the overrides of the first."""
    budget = _Unit.for_sizes([fit.budget_bytes]).with_name(fit.budget_bytes)
    unit = _Unit.for_sizes([strategy.plan.process_bytes[1] for strategy in fit.strategies])
    if fit.models:
        return _format_models(fit, budget)
    if not fit.strategies:
        return f"No strategy fits {budget}: all were tried down to a micro-batch size of 1."
    costs = get_comparable_costs(fit.strategies)
    rows = [
        {
            "strategy": strategy.name,
            "micro-batch": strategy.plan.micro_batch_size,
            f"allocated ({unit.name})": unit.format(strategy.plan.peak.allocated_bytes),
            f"process, at most ({unit.name})": unit.format(strategy.plan.process_bytes[1]),
            "time": _format_ratio(cost, costs[0]),
            "trade-offs": "; ".join(strategy.tradeoffs) or "none",
        }
        for strategy, cost in zip(fit.strategies, costs, strict=True)
    ]
    best = fit.strategies[0]
    basis = _describe_time_basis(best)
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


def _describe_time_basis(strategy: Strategy) -> str:
    if strategy.plan.step_time is not None:
        return f"simulated operations, {strategy.plan.step_time.basis}"
    return "data sheet FLOP/s" if strategy.step_seconds else "FLOPs, ignoring their precision"


def _format_models(fit: Fit, budget: str) -> str:
    """Return a table of a family's models, from the largest to the first that fits."""
    unit = _Unit.for_sizes([model.strategy.plan.process_bytes[1] for model in fit.models if model.strategy])
    rows = [
        {
            "model": model.name,
            "parameters": f"{model.parameters:,}",
            f"in {budget}": "fits" if model.strategy else "does not fit",
            "overrides": " ".join(model.strategy.overrides) if model.strategy else "",
            f"process, at most ({unit.name})": unit.format(model.strategy.plan.process_bytes[1])
            if model.strategy
            else "",
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


def _engine_clause(plan: Plan) -> str:
    return f", {plan.engine}, per process ({plan.num_processes} processes)" if plan.engine != "single" else ""


def _format_ratio(value: float | None, reference: float | None) -> str:
    return f"{value / reference:.2f}x" if value and reference else "unknown"


def _format_margin(low: int, high: int, unit: _Unit) -> str:
    if low >= 0:
        return f"{unit.format_range((low, high))} {unit.name} to spare"
    if high < 0:
        return f"{unit.format_range((-high, -low))} {unit.name} too much"
    return f"from {unit.with_name(-low)} too much to {unit.with_name(high)} to spare"
