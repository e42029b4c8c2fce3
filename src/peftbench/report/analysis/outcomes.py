"""How runs ended that did not end well, in words."""

from __future__ import annotations

from collections.abc import Iterator

from peftbench.record import Outcome, RunRecord
from peftbench.report.analysis.run_groups import RunGroup
from peftbench.report.text.escape import printable_line

_MIB = 2**20
_STEP_PART_NAMES = {"forward": "the forward pass", "backward": "the backward pass", "optimizer": "the optimizer step"}
_MAX_ERROR_CHARS = 200
"""Characters of an error that are shown."""


def outcome_sentences(group: RunGroup) -> Iterator[str]:
    """A sentence for each kind of end of a configuration's runs but a good one, of the first that ended so."""
    by_kind: dict[str, list[RunRecord]] = {}
    for run in group.runs:
        by_kind.setdefault(run.outcome.kind, []).append(run)
    for kind, runs in by_kind.items():
        if kind != "ok":
            which = f" ({len(runs)} of {len(group.runs)} runs)" if len(group.runs) > 1 else ""
            yield f"{group.label}{which}: {_outcome_clause(runs[0].outcome)}"


def _outcome_clause(outcome: Outcome) -> str:
    at = f" at step {outcome.step}" if outcome.step is not None else ""
    match outcome.kind:
        case "oom":
            return oom_sentence(outcome)
        case "diverged":
            return f"diverged{at}, so that nothing is said of what it learned"
        case "preempted":
            return f"was stopped{at} and has no result; the same command goes on with it"
        case _:
            error = printable_line(outcome.error or "")
            short = f"{error[:_MAX_ERROR_CHARS]}…" if len(error) > _MAX_ERROR_CHARS else error
            where = f" in {outcome.phase}" if outcome.phase else ""
            return f"failed{where}{at}" + (f": {short}" if short else "")


def oom_sentence(outcome: Outcome) -> str:
    """Where a run was out of memory, by how much, what it is predicted to need, and what would fit."""
    place = _STEP_PART_NAMES.get(outcome.step_part or "", outcome.step_part or outcome.phase)
    where = (f" in {place}" if place else "") + (f" of step {outcome.step}" if outcome.step is not None else "")
    asked = [
        f"{what} {size / _MIB:,.1f} MiB"
        for what, size in (("asked for", outcome.requested_bytes), ("held", outcome.in_use_bytes))
        if size is not None
    ]
    told = f"out of memory{where}" + (f", where it {' and '.join(asked)}" if asked else "")
    if outcome.estimated_peak_bytes is not None:
        told += f"; predicted to need {outcome.estimated_peak_bytes / _MIB:,.0f} MiB at least"
    return told + (f"; {printable_line(outcome.suggestion)}" if outcome.suggestion else "")
