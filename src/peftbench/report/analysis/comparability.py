"""Comparability of runs: differences other than the method, and reasons not to compare costs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from peftbench.record import RunRecord
from peftbench.report.analysis.run_groups import RunGroup, Seed, seed_of


def has_protocol_differences(records: Sequence[RunRecord]) -> bool:
    """True if the runs, all trained, differ in more than their method: in batches, steps, examples or lengths."""
    token_counts: dict[Seed, set[str]] = {}  # of the runs of each seed
    for record in records:
        token_counts.setdefault(seed_of(record), set()).add(json.dumps(_token_counts(record)))
    return len({json.dumps(_protocol_key(record)) for record in records}) > 1 or any(
        len(counts) > 1 for counts in token_counts.values()
    )


def _protocol_key(record: RunRecord) -> list[object]:
    """Return values that must be equal in all runs, for any seed."""
    recipe = record.recipe
    return [
        record.data_fingerprint,
        record.model_fingerprint,
        record.num_examples,
        record.steps,
        recipe["train"]["global_batch_size"],
        recipe["data"]["max_length"],
        recipe["data"]["label_padding"],
        recipe["train"]["precision"],
    ]


def _token_counts(record: RunRecord) -> list[int]:
    """Return token counts, which are equal if the order of examples is."""
    return [record.tokens.real, record.tokens.labeled] if record.tokens else []


def why_not_comparable(group: RunGroup, reference: RunGroup) -> str | None:
    """Return why the costs of two groups cannot be compared; None if they can."""
    runs = (*group.ok_runs, *reference.ok_runs)
    if len({(run.device.type, run.device.name, run.device.num_processes) for run in runs}) > 1:
        return "on a different device"
    if len({run.engine and (run.engine.name, run.engine.distributed_type, run.engine.num_threads) for run in runs}) > 1:
        return "on a different engine"
    if len({(run.steps, run.recipe["train"]["global_batch_size"]) for run in runs}) > 1:
        return "with different steps or batches"
    return None
