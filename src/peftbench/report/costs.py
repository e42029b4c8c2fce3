"""What a configuration took, by what another one did."""

from __future__ import annotations

from peftbench.report.configurations import Configuration

LEAST_STEPS = 10
"""Of fewer timed steps there is no tenth percentile that would say how much a step's time varies."""


def costs(one: Configuration, than: Configuration) -> str:
    """The end of a sentence on ``one`` after ``than`` was named; empty where nothing is known or one trains nothing.

    Memory and required FLOPs are compared by their means; time only where the steps' tenth to ninetieth percentiles do
    not overlap, since a machine is never twice the same.
    """
    if not (one.trains and than.trains):
        return ""
    if (reason := apart(one, than)) is not None:
        return f"; it ran {reason}, so that costs are not compared"
    shares = [
        (one.peak_bytes, than.peak_bytes, "memory"),
        (*_times(one, than), "time"),
        (one.required_flops, than.required_flops, "required FLOPs"),
    ]
    told = [f"{_percent(a / b)} of its {what}" for a, b, what in shares if a is not None and b]
    said = f", at {' and '.join([', '.join(told[:-1]), told[-1]] if len(told) > 1 else told)}" if told else ""
    return said + (f"; its time cannot be told apart from that of {than.label}" if _overlap(one, than) else "")


def apart(one: Configuration, than: Configuration) -> str | None:
    """Why costs do not compare, None where they do."""
    runs = (*one.ok, *than.ok)
    if len({(run.device.kind, run.device.name, run.device.processes) for run in runs}) > 1:
        return "on another device"
    if len({run.engine and (run.engine.name, run.engine.kind, run.engine.threads) for run in runs}) > 1:
        return "on another engine"
    if len({(run.steps, run.recipe["train"]["global_batch"]) for run in runs}) > 1:
        return "for other steps or batches"
    return None


def _overlap(one: Configuration, than: Configuration) -> bool:
    if one.step_seconds is None or than.step_seconds is None:
        return False
    (low, high), (other_low, other_high) = one.step_seconds, than.step_seconds
    return low <= other_high and other_low <= high


def _times(one: Configuration, than: Configuration) -> tuple[float | None, float | None]:
    """Mean training seconds of both, where they are of as many steps, of enough, and can be told apart."""
    timed = {run.throughput.steps for run in (*one.ok, *than.ok) if run.throughput is not None}
    if timed and min(timed) < LEAST_STEPS:
        return None, None
    if one.step_seconds is None or than.step_seconds is None or len(timed) != 1 or _overlap(one, than):
        return None, None
    return one.train_seconds, than.train_seconds


def _percent(share: float) -> str:
    """Two digits where there are no more before the point."""
    return f"{share:.0%}".replace("%", " %") if share >= 0.095 else f"{100 * share:.2g} %"
