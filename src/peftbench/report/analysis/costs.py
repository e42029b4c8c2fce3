"""What a configuration took, by what another one did."""

from __future__ import annotations

from peftbench.record.sanity_checks import RSS_SLACK_BYTES
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.text.formatting import join_with_and

MIN_TIMED_STEPS = 10
"""Of fewer timed steps there is no tenth percentile that would say how much a step's time varies."""


def cost_clause(one: RunGroup, than: RunGroup) -> str:
    """The end of a sentence on ``one`` after ``than`` was named; empty where nothing is known or one trains nothing.

    Required FLOPs are exact. Memory and time are compared by their means, and only where they can be told apart: where
    the ranges of the runs' peaks do not overlap (on a CPU, where pages come and go, by ``RESIDENT_SLACK`` at least),
    and those of the steps' tenth to ninetieth percentiles do not. Of one run each that is said of the time, since
    another run may be another one's pace; a peak repeats.
    """
    if not (one.trains and than.trains):
        return ""
    if (reason := why_not_comparable(one, than)) is not None:
        return f"; it ran {reason}, so that costs are not compared"
    same = [what for what, alike in (("memory", _has_similar_peak(one, than)), ("time", _has_similar_speed(one, than))) if alike]
    shares = [
        ("memory", *_distinct_peaks(one, than), ""),
        ("time", *_distinct_train_times(one, than), " in one run each" if len(one.ok) == len(than.ok) == 1 else ""),
        ("required FLOPs", one.required_flops, than.required_flops, ""),
    ]
    told = [f"{_format_percent(a / b)} of its {what}{how}" for what, a, b, how in shares if a is not None and b]
    said = f", at {join_with_and(told)}" if told else ""
    whose = f"{'those' if len(same) > 1 else 'that'} of {than.label}"
    return said + (f"; its {join_with_and(same, 'its ')} cannot be told apart from {whose}" if same else "")


def why_not_comparable(one: RunGroup, than: RunGroup) -> str | None:
    """Why costs do not compare, None where they do."""
    runs = (*one.ok, *than.ok)
    if len({(run.device.kind, run.device.name, run.device.processes) for run in runs}) > 1:
        return "on another device"
    if len({run.engine and (run.engine.name, run.engine.kind, run.engine.threads) for run in runs}) > 1:
        return "on another engine"
    if len({(run.steps, run.recipe["train"]["global_batch_size"]) for run in runs}) > 1:
        return "for other steps or batches"
    return None


def _has_similar_speed(one: RunGroup, than: RunGroup) -> bool:
    return _ranges_overlap(one.step_seconds, than.step_seconds)


def _has_similar_peak(one: RunGroup, than: RunGroup) -> bool:
    slack = RSS_SLACK_BYTES if any(run.device.kind == "cpu" for run in (*one.ok, *than.ok)) else 0
    both = (one.peak_range, than.peak_range)
    if both[0] is not None and both[0] == both[1] and both[0][0] == both[0][1]:
        return False  # the very same peak in all runs, which is told
    return _ranges_overlap(*both, slack)


def _ranges_overlap(one: tuple[float, float] | None, other: tuple[float, float] | None, slack: float = 0.0) -> bool:
    """Whether two ranges have something in common, or lie closer than ``slack``; False where one is not known."""
    return one is not None and other is not None and one[0] <= other[1] + slack and other[0] <= one[1] + slack


def _distinct_peaks(one: RunGroup, than: RunGroup) -> tuple[float | None, float | None]:
    """Mean peaks of both, where they can be told apart."""
    return (None, None) if _has_similar_peak(one, than) else (one.peak_bytes, than.peak_bytes)


def _distinct_train_times(one: RunGroup, than: RunGroup) -> tuple[float | None, float | None]:
    """Mean training seconds of both, where they are of as many steps, of enough, and can be told apart."""
    timed = {run.throughput.steps for run in (*one.ok, *than.ok) if run.throughput is not None}
    if timed and min(timed) < MIN_TIMED_STEPS:
        return None, None
    if one.step_seconds is None or than.step_seconds is None or len(timed) != 1 or _has_similar_speed(one, than):
        return None, None
    return one.train_seconds, than.train_seconds


def _format_percent(share: float) -> str:
    """Two digits where there are no more before the point."""
    return f"{share:.0%}".replace("%", " %") if share >= 0.095 else f"{100 * share:.2g} %"
