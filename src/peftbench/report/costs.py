"""What a configuration took, by what another one did."""

from __future__ import annotations

from peftbench.plausibility import RESIDENT_SLACK
from peftbench.report.configurations import Configuration
from peftbench.report.lines import listed

LEAST_STEPS = 10
"""Of fewer timed steps there is no tenth percentile that would say how much a step's time varies."""


def costs(one: Configuration, than: Configuration) -> str:
    """The end of a sentence on ``one`` after ``than`` was named; empty where nothing is known or one trains nothing.

    Required FLOPs are exact. Memory and time are compared by their means, and only where they can be told apart: where
    the ranges of the runs' peaks do not overlap (on a CPU, where pages come and go, by ``RESIDENT_SLACK`` at least),
    and those of the steps' tenth to ninetieth percentiles do not. Of one run each that is said of the time, since
    another run may be another one's pace; a peak repeats.
    """
    if not (one.trains and than.trains):
        return ""
    if (reason := apart(one, than)) is not None:
        return f"; it ran {reason}, so that costs are not compared"
    same = [what for what, alike in (("memory", _as_large(one, than)), ("time", _as_fast(one, than))) if alike]
    shares = [
        ("memory", *_peaks(one, than), ""),
        ("time", *_times(one, than), " in one run each" if len(one.ok) == len(than.ok) == 1 else ""),
        ("required FLOPs", one.required_flops, than.required_flops, ""),
    ]
    told = [f"{_percent(a / b)} of its {what}{how}" for what, a, b, how in shares if a is not None and b]
    said = f", at {listed(told)}" if told else ""
    whose = f"{'those' if len(same) > 1 else 'that'} of {than.label}"
    return said + (f"; its {listed(same, 'its ')} cannot be told apart from {whose}" if same else "")


def apart(one: Configuration, than: Configuration) -> str | None:
    """Why costs do not compare, None where they do."""
    runs = (*one.ok, *than.ok)
    if len({(run.device.kind, run.device.name, run.device.processes) for run in runs}) > 1:
        return "on another device"
    if len({run.engine and (run.engine.name, run.engine.kind, run.engine.threads) for run in runs}) > 1:
        return "on another engine"
    if len({(run.steps, run.recipe["train"]["global_batch_size"]) for run in runs}) > 1:
        return "for other steps or batches"
    return None


def _as_fast(one: Configuration, than: Configuration) -> bool:
    return _overlap(one.step_seconds, than.step_seconds)


def _as_large(one: Configuration, than: Configuration) -> bool:
    slack = RESIDENT_SLACK if any(run.device.kind == "cpu" for run in (*one.ok, *than.ok)) else 0
    both = (one.peak_range, than.peak_range)
    if both[0] is not None and both[0] == both[1] and both[0][0] == both[0][1]:
        return False  # the very same peak in all runs, which is told
    return _overlap(*both, slack)


def _overlap(one: tuple[float, float] | None, other: tuple[float, float] | None, slack: float = 0.0) -> bool:
    """Whether two ranges have something in common, or lie closer than ``slack``; False where one is not known."""
    return one is not None and other is not None and one[0] <= other[1] + slack and other[0] <= one[1] + slack


def _peaks(one: Configuration, than: Configuration) -> tuple[float | None, float | None]:
    """Mean peaks of both, where they can be told apart."""
    return (None, None) if _as_large(one, than) else (one.peak_bytes, than.peak_bytes)


def _times(one: Configuration, than: Configuration) -> tuple[float | None, float | None]:
    """Mean training seconds of both, where they are of as many steps, of enough, and can be told apart."""
    timed = {run.throughput.steps for run in (*one.ok, *than.ok) if run.throughput is not None}
    if timed and min(timed) < LEAST_STEPS:
        return None, None
    if one.step_seconds is None or than.step_seconds is None or len(timed) != 1 or _as_fast(one, than):
        return None, None
    return one.train_seconds, than.train_seconds


def _percent(share: float) -> str:
    """Two digits where there are no more before the point."""
    return f"{share:.0%}".replace("%", " %") if share >= 0.095 else f"{100 * share:.2g} %"
