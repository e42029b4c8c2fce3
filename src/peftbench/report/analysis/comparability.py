"""What must be equal for a comparison to be one of methods."""

from __future__ import annotations

import json
from collections.abc import Sequence

from peftbench.record import RunRecord
from peftbench.report.analysis.run_groups import Seed, seed_of


def protocol_differs(records: Sequence[RunRecord]) -> bool:
    """Whether runs that trained differ in more than their method: in batches, steps, examples or lengths."""
    shown: dict[Seed, set[str]] = {}  # the tokens that runs of one seed were shown
    for record in records:
        shown.setdefault(seed_of(record), set()).add(json.dumps(_token_counts(record)))
    return len({json.dumps(_protocol_key(record)) for record in records}) > 1 or any(
        len(one) > 1 for one in shown.values()
    )


def _protocol_key(record: RunRecord) -> list[object]:
    """Equal in all runs, whatever their seeds."""
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
    """Equal where the order of examples is."""
    return [record.tokens.real, record.tokens.labelled] if record.tokens else []
