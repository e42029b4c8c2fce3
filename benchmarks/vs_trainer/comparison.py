"""Build the table of a folder of records: each peer relative to peftbench, by ratios within a repeat."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from measured import Measured
from spec import ARMS, CASES, OURS, STUDY, TARGETS, Target, tolerance
from tabulate import tabulate

MIB = 2**20
UNKNOWN = "–"


def pair_records(records: Sequence[Measured], case: str, arm: str) -> list[tuple[Measured, Measured]]:
    """Return (the arm's, peftbench's) records of each repeat that has both."""
    ours = {record.repeat: record for record in records if (record.case, record.arm) == (case, OURS)}
    theirs = sorted((r for r in records if (r.case, r.arm) == (case, arm)), key=lambda record: record.repeat)
    return [(record, ours[record.repeat]) for record in theirs if record.repeat in ours]


def max_loss_difference(first: Measured, second: Measured) -> float:
    """Return the largest relative difference between the losses of two arms."""
    found = [abs(mine / its - 1) for mine, its in zip(first.losses, second.losses, strict=True)]
    return max(found, key=lambda value: math.inf if math.isnan(value) else value)


def problems(records: Sequence[Measured]) -> list[str]:
    """Return why records are not comparable: other tokens, losses, settings or data."""
    found = [f"the records have more than one {what}: {', '.join(sorted(had))}" for what, had in _unlike(records)]
    for case in CASES:
        for arm in ARMS:
            for theirs, ours in pair_records(records, case, arm):
                where = f"{case}, {arm}, repeat {theirs.repeat}"
                if (theirs.real_tokens, theirs.labeled_tokens) != (ours.real_tokens, ours.labeled_tokens):
                    found.append(f"{where}: its steps have other tokens than peftbench's")
                elif len(theirs.losses) != len(ours.losses):
                    found.append(f"{where}: {len(theirs.losses)} steps; peftbench has {len(ours.losses)}")
                elif not max_loss_difference(theirs, ours) <= tolerance(arm, theirs.spec):
                    found.append(
                        f"{where}: losses up to {max_loss_difference(theirs, ours):.3%} from peftbench's, "
                        f"{tolerance(arm, theirs.spec):.3%} is allowed"
                    )
                if theirs.model_flops not in {None, ours.model_flops}:
                    found.append(f"{where}: its model FLOPs differ from peftbench's")
                if theirs.trainable_parameters != ours.trainable_parameters:
                    found.append(
                        f"{where}: it trains {theirs.trainable_parameters:,} parameters; peftbench trains others"
                    )
    return found


def _unlike(records: Sequence[Measured]) -> Iterator[tuple[str, set[str]]]:
    properties: dict[str, Callable[[Measured], str]] = {
        "device": lambda r: r.device_name,
        "spec": lambda r: r.spec.model_dump_json(),
        "data": lambda r: r.data_fingerprint,
        "base": lambda r: r.model_fingerprint,
        "checkout": lambda r: str(r.git),
    }
    for what, of in properties.items():
        if len(had := {of(record) for record in records}) > 1:
            yield what, had


def ratio(values: Sequence[float]) -> str:
    """Return the median with its range."""
    if not values:
        return UNKNOWN
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.2f}x" if len(values) == 1 else f"{middle:.2f}x ({low:.2f}–{high:.2f})"


def row(records: Sequence[Measured], case: str, arm: str) -> dict[str, str] | None:
    """Return a table row; None if the arm was not measured."""
    mine = [record for record in records if (record.case, record.arm) == (case, arm)]
    if not mine:
        return None
    pairs = pair_records(records, case, arm) if arm != OURS else []
    peaks = [record.peak_bytes for record in mine if record.peak_bytes is not None]
    shares = [r.model_flops / r.hardware_flops for r in mine if r.model_flops and r.hardware_flops]
    faster = [ours.tokens_per_second / theirs.tokens_per_second for theirs, ours in pairs]
    smaller = [theirs.peak_bytes / ours.peak_bytes for theirs, ours in pairs if theirs.peak_bytes and ours.peak_bytes]
    return {
        "method": CASES[case].title,
        "trained by": ARMS[arm],
        "real tokens/s": f"{statistics.median(record.tokens_per_second for record in mine):,.0f}",
        "peftbench speedup": ratio(faster),
        "peak MiB": f"{statistics.median(peaks) / MIB:,.0f}" if peaks else UNKNOWN,
        "peftbench memory saving": ratio(smaller),
        "model / hardware FLOPs": f"{statistics.median(shares):.1%}" if shares else UNKNOWN,
        "max. loss difference": f"{max(max_loss_difference(*pair) for pair in pairs):.1e}" if pairs else UNKNOWN,
    }


def fastest_other(records: Sequence[Measured], case: str) -> str | None:
    """Return the other arm with the most real tokens per second, by medians; None without other arms."""
    speeds = {
        arm: statistics.median(theirs.tokens_per_second for theirs, _ in pairs)
        for arm in ARMS
        if arm != OURS and (pairs := pair_records(records, case, arm))
    }
    return max(speeds, key=lambda arm: speeds[arm], default=None)


def measure_target(records: Sequence[Measured], target: Target, arm: str) -> list[float]:
    """Return peftbench's speed or peak memory relative to this arm, per repeat."""
    pairs = pair_records(records, target.case, arm)
    if target.what == "speed":
        return [ours.tokens_per_second / theirs.tokens_per_second for theirs, ours in pairs]
    return [ours.peak_bytes / theirs.peak_bytes for theirs, ours in pairs if theirs.peak_bytes and ours.peak_bytes]


def is_met(target: Target, wanted: float, values: Sequence[float]) -> str:
    """Return "yes" if the unrounded median meets the target."""
    if not values:
        return UNKNOWN
    middle = statistics.median(values)
    return "yes" if (middle >= wanted if target.what == "speed" else middle <= wanted) else "no"


def render_targets(records: Sequence[Measured]) -> str:
    """Return the table of targets: the value reached, and whether it suffices."""
    rows = []
    for target in TARGETS:
        best = fastest_other(records, target.case)
        for arm, wanted, whose in ((STUDY, target.study, ""), (best, target.best, "the best other arm: ")):
            if best is None or arm is None:
                continue
            values = measure_target(records, target, arm)
            speed = target.what == "speed"
            rows.append(
                {
                    "measure": f"{'speed' if speed else 'peak memory'}, {CASES[target.case].title}",
                    "relative to": whose + ARMS[arm],
                    "target": f"{'at least' if speed else 'at most'} {wanted:.2f}x",
                    "reached": ratio(values),
                    "met": is_met(target, wanted, values),
                }
            )
    if not rows:
        return ""
    align = ["left", "left", "right", "right", "left"]
    made = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, colalign=align)
    return (
        f"{made}\n\n(The best other arm is the fastest one, by real tokens/s; peak memory is compared with its peak.)"
    )


def table(records: Sequence[Measured]) -> str:
    """Return the report in Markdown, with devices and versions below the tables."""
    rows = [found for case in CASES for arm in ARMS if (found := row(records, case, arm))]
    align = ["left", "left", *["right"] * (len(rows[0]) - 2)]
    made = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, colalign=align)
    notes = sorted({f"{ARMS[record.arm]}: {note}" for record in records for note in record.notes})
    lines = [*_origin(records), *notes, *(f"NOT COMPARABLE: {problem}" for problem in problems(records))]
    parts = [made, render_targets(records), "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(part for part in parts if part)


def _origin(records: Sequence[Measured]) -> list[str]:
    """Return one line for each combination of device, settings and versions."""
    found = set()
    for record in records:
        spec, versions = record.spec, record.versions
        named = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
        found.add(
            f"{record.device_name} ({record.device_kind}, {record.threads} threads), {spec.precision}, "
            f"{spec.batch} examples per step, {spec.steps} timed steps after {record.untimed_steps} untimed steps, "
            f"dropout {spec.dropout}; "
            f"{named}; data {record.data_fingerprint[:8]}, base {record.model_fingerprint.split()[-1][:8]}"
        )
    repeats = len({record.repeat for record in records})
    return [*sorted(found), f"{repeats} repeats: medians; for ratios also the range"]


_SHOWN = ("torch", "transformers", "trl", "peft", "accelerate")
