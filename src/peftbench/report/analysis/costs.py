"""Costs of a group of runs relative to another group."""

from __future__ import annotations

from peftbench.record.sanity_checks import RSS_SLACK_BYTES
from peftbench.report.analysis.comparability import why_not_comparable
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.text.formatting import join_with_and

MIN_TIMED_STEPS = 10
"""Minimum number of timed steps for their 10th and 90th percentiles to be meaningful."""


def cost_clause(group: RunGroup, reference: RunGroup) -> str:
    """Return a clause with the costs of ``group`` relative to ``reference``; empty if unknown or one is a baseline.

    Model FLOPs are exact. Memory and time are compared by their means, and only if their ranges do not overlap: the
    ranges of the runs' peaks (on CPU with a tolerance of ``RSS_SLACK_BYTES``), and the ranges from the 10th to the 90th
    percentile of step seconds. The clause marks a time from single runs, because time varies between runs and a peak
    does not.
    """
    if not (group.is_trained and reference.is_trained):
        return ""
    if (reason := why_not_comparable(group, reference)) is not None:
        return f"; it ran {reason}, so costs are not compared"
    similar = [
        cost
        for cost, is_similar in (
            ("memory", _has_similar_peak(group, reference)),
            ("time", _has_similar_speed(group, reference)),
        )
        if is_similar
    ]
    ratios = [
        ("memory", *_distinct_peaks(group, reference), ""),
        (
            "time",
            *_distinct_train_times(group, reference),
            " (single runs)" if len(group.ok_runs) == len(reference.ok_runs) == 1 else "",
        ),
        ("model FLOPs", group.mean_model_flops, reference.mean_model_flops, ""),
    ]
    known = [f"{_format_percent(a / b)} of its {cost}{suffix}" for cost, a, b, suffix in ratios if a is not None and b]
    clause = f", at {join_with_and(known)}" if known else ""
    verb = "do" if len(similar) > 1 else "does"
    return clause + (f"; {join_with_and(similar)} {verb} not differ measurably" if similar else "")


def find_cheaper_cost(group: RunGroup, other: RunGroup) -> str | None:
    """Return the first of memory, time and model FLOPs that differs measurably, if ``group`` needs less; else None."""
    if why_not_comparable(group, other) is not None:
        return None
    pairs = {
        "memory": _distinct_peaks(group, other),
        "time": _distinct_train_times(group, other),
        "model FLOPs": (group.mean_model_flops, other.mean_model_flops),
    }
    for name, (own, others) in pairs.items():
        if own is not None and others is not None and own != others:
            return name if own < others else None
    return None


def _has_similar_speed(group: RunGroup, reference: RunGroup) -> bool:
    return _ranges_overlap(group.step_seconds_range, reference.step_seconds_range)


def _has_similar_peak(group: RunGroup, reference: RunGroup) -> bool:
    slack = RSS_SLACK_BYTES if any(run.device.type == "cpu" for run in (*group.ok_runs, *reference.ok_runs)) else 0
    both = (group.peak_bytes_range, reference.peak_bytes_range)
    if both[0] is not None and both[0] == both[1] and both[0][0] == both[0][1]:
        return False  # the same peak in all runs, which is reported as 100 %
    return _ranges_overlap(*both, slack)


def _ranges_overlap(
    first: tuple[float, float] | None, second: tuple[float, float] | None, tolerance: float = 0.0
) -> bool:
    """True if two ranges overlap or are closer than ``tolerance``; False if one is unknown."""
    return (
        first is not None
        and second is not None
        and first[0] <= second[1] + tolerance
        and second[0] <= first[1] + tolerance
    )


def _distinct_peaks(group: RunGroup, reference: RunGroup) -> tuple[float | None, float | None]:
    """Return the mean peaks of both if they differ measurably, else None twice."""
    return (None, None) if _has_similar_peak(group, reference) else (group.mean_peak_bytes, reference.mean_peak_bytes)


def _distinct_train_times(group: RunGroup, reference: RunGroup) -> tuple[float | None, float | None]:
    """Return mean train seconds if they differ measurably and cover equally many (and enough) timed steps."""
    timed = {run.throughput.steps for run in (*group.ok_runs, *reference.ok_runs) if run.throughput is not None}
    if timed and min(timed) < MIN_TIMED_STEPS:
        return None, None
    if (
        group.step_seconds_range is None
        or reference.step_seconds_range is None
        or len(timed) != 1
        or _has_similar_speed(group, reference)
    ):
        return None, None
    return group.mean_train_seconds, reference.mean_train_seconds


def _format_percent(fraction: float) -> str:
    """Format a fraction as percent with at least two digits."""
    return f"{fraction:.0%}".replace("%", " %") if fraction >= 0.095 else f"{100 * fraction:.2g} %"
