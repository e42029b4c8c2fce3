"""What a configuration took, by what another one did."""

from __future__ import annotations

from peftbench.record.sanity_checks import RSS_SLACK_BYTES
from peftbench.report.analysis.comparability import why_not_comparable
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.text.formatting import join_with_and

MIN_TIMED_STEPS = 10
"""Of fewer timed steps there is no tenth percentile that would say how much a step's time varies."""


def cost_clause(group: RunGroup, reference: RunGroup) -> str:
    """The end of a sentence on ``one`` after ``than`` was named; empty where nothing is known or one trains nothing.

    Required FLOPs are exact. Memory and time are compared by their means, and only where they can be told apart: where
    the ranges of the runs' peaks do not overlap (on a CPU, where pages come and go, by ``RESIDENT_SLACK`` at least),
    and those of the steps' tenth to ninetieth percentiles do not. Of one run each that is said of the time, since
    another run may be another one's pace; a peak repeats.
    """
    if not (group.is_trained and reference.is_trained):
        return ""
    if (reason := why_not_comparable(group, reference)) is not None:
        return f"; it ran {reason}, so that costs are not compared"
    same = [
        what
        for what, alike in (
            ("memory", _has_similar_peak(group, reference)),
            ("time", _has_similar_speed(group, reference)),
        )
        if alike
    ]
    shares = [
        ("memory", *_distinct_peaks(group, reference), ""),
        (
            "time",
            *_distinct_train_times(group, reference),
            " in one run each" if len(group.ok_runs) == len(reference.ok_runs) == 1 else "",
        ),
        ("required FLOPs", group.mean_model_flops, reference.mean_model_flops, ""),
    ]
    told = [f"{_format_percent(a / b)} of its {what}{how}" for what, a, b, how in shares if a is not None and b]
    said = f", at {join_with_and(told)}" if told else ""
    whose = f"{'those' if len(same) > 1 else 'that'} of {reference.label}"
    return said + (f"; its {join_with_and(same, 'its ')} cannot be told apart from {whose}" if same else "")


def _has_similar_speed(group: RunGroup, reference: RunGroup) -> bool:
    return _ranges_overlap(group.step_seconds_range, reference.step_seconds_range)


def _has_similar_peak(group: RunGroup, reference: RunGroup) -> bool:
    slack = RSS_SLACK_BYTES if any(run.device.type == "cpu" for run in (*group.ok_runs, *reference.ok_runs)) else 0
    both = (group.peak_bytes_range, reference.peak_bytes_range)
    if both[0] is not None and both[0] == both[1] and both[0][0] == both[0][1]:
        return False  # the very same peak in all runs, which is told
    return _ranges_overlap(*both, slack)


def _ranges_overlap(
    first: tuple[float, float] | None, second: tuple[float, float] | None, tolerance: float = 0.0
) -> bool:
    """Whether two ranges have something in common, or lie closer than ``slack``; False where one is not known."""
    return (
        first is not None
        and second is not None
        and first[0] <= second[1] + tolerance
        and second[0] <= first[1] + tolerance
    )


def _distinct_peaks(group: RunGroup, reference: RunGroup) -> tuple[float | None, float | None]:
    """Mean peaks of both, where they can be told apart."""
    return (None, None) if _has_similar_peak(group, reference) else (group.mean_peak_bytes, reference.mean_peak_bytes)


def _distinct_train_times(group: RunGroup, reference: RunGroup) -> tuple[float | None, float | None]:
    """Mean training seconds of both, where they are of as many steps, of enough, and can be told apart."""
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
    """Two digits where there are no more before the point."""
    return f"{fraction:.0%}".replace("%", " %") if fraction >= 0.095 else f"{100 * fraction:.2g} %"
