"""Sentences on runs that did not end with outcome ok."""

from __future__ import annotations

from collections.abc import Iterator

from peftbench.record import RunRecord
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.reproduce import build_fitting_command
from peftbench.report.text.escape import printable_line

_MIB = 2**20
_STEP_PART_NAMES = {"forward": "the forward pass", "backward": "the backward pass", "optimizer": "the optimizer step"}
_MAX_ERROR_CHARS = 200
"""Maximum number of shown characters of an error."""


def outcome_sentences(group: RunGroup) -> Iterator[str]:
    """Yield a sentence for each outcome of a group except ok, about the first run with it."""
    by_kind: dict[str, list[RunRecord]] = {}
    for run in group.runs:
        by_kind.setdefault(run.outcome.kind, []).append(run)
    for kind, runs in by_kind.items():
        if kind != "ok":
            which = f" ({len(runs)} of {len(group.runs)} runs)" if len(group.runs) > 1 else ""
            yield f"{group.label}{which}: {_outcome_clause(runs[0])}"


def _outcome_clause(record: RunRecord) -> str:
    outcome = record.outcome
    at = f" at step {outcome.step}" if outcome.step is not None else ""
    match outcome.kind:
        case "oom":
            return oom_sentence(record)
        case "diverged":
            return f"diverged{at}, so its quality is not compared"
        case "preempted":
            return f"was stopped{at} and has no result; run the same command to resume it"
        case _:
            error = printable_line(outcome.error or "")
            short = f"{error[:_MAX_ERROR_CHARS]}…" if len(error) > _MAX_ERROR_CHARS else error
            where = f" in {outcome.phase}" if outcome.phase else ""
            return f"failed{where}{at}" + (f": {short}" if short else "")


def oom_sentence(record: RunRecord) -> str:
    """Return where a run ran out of memory, the sizes, the predicted need, and the command that is predicted to fit."""
    outcome = record.outcome
    place = _STEP_PART_NAMES.get(outcome.step_part or "", outcome.step_part or outcome.phase)
    where = (f" in {place}" if place else "") + (f" of step {outcome.step}" if outcome.step is not None else "")
    sizes = [
        f"{label} {size / _MIB:,.1f} MiB"
        for label, size in (("requested", outcome.requested_bytes), ("in use", outcome.in_use_bytes))
        if size is not None
    ]
    sentence = f"out of memory{where}" + (f" ({', '.join(sizes)})" if sizes else "")
    if outcome.estimated_peak_bytes is not None:
        sentence += f"; estimated need: at least {outcome.estimated_peak_bytes / _MIB:,.0f} MiB"
    sentence += f"; {printable_line(outcome.suggestion)}" if outcome.suggestion else ""
    return sentence + (f": {command}" if (command := build_fitting_command(record)) else "")
