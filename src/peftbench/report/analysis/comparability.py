"""Comparability of runs: differences other than the method, and reasons not to compare costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from peftbench.record import RunRecord
from peftbench.report.analysis.run_groups import RunGroup, Seed, seed_of
from peftbench.report.text.formatting import join_with_and


def _count_used_examples(record: RunRecord) -> dict[str, int]:
    """Return the trained and evaluated examples by split, without those that were evaluated only during training."""
    used = {"train", record.quality.split} if record.quality is not None else set(record.num_examples)
    return {split: count for split, count in record.num_examples.items() if split in used}


_ANY = object()
"""Equal to every value: the run does not have the setting."""


def _get_frozen_dtype(record: RunRecord) -> object:
    """Return the type of frozen weights; a method that trains every weight has none. Before the key it was fp32."""
    if record.parameters is not None and record.parameters.trainable >= record.parameters.total:
        return _ANY
    return record.recipe.get("model", {}).get("dtype", "fp32")


_PROTOCOL: dict[str, Callable[[RunRecord], object]] = {
    "data": lambda record: record.data_fingerprint,
    "base model": lambda record: record.model_fingerprint,
    "number of examples": _count_used_examples,
    "steps": lambda record: record.steps,
    "train.global_batch_size": lambda record: record.recipe["train"]["global_batch_size"],
    "data.max_length": lambda record: record.recipe["data"]["max_length"],
    "task": lambda record: record.recipe.get("task"),
    "data.label_padding": lambda record: record.recipe["data"]["label_padding"],
    "train.precision": lambda record: record.recipe["train"]["precision"],
    "model.attention": lambda record: record.recipe.get("model", {}).get("attention"),
    "model.dtype": _get_frozen_dtype,
}
"""Values that must be equal in all runs of a comparison, for any seed."""


def list_protocol_differences(records: Sequence[RunRecord]) -> list[str]:
    """Return what the runs, all trained, differ in other than their method; recipe keys come with their values."""
    differences = []
    config_fingerprints = {record.model_config_fingerprint for record in records} - {None}  # not in older records
    if len(config_fingerprints) > 1:
        differences.append("config.json of the base model")
    for name, get_value in _PROTOCOL.items():
        found = (get_value(record) for record in records)
        values = list(dict.fromkeys(json.dumps(value) for value in found if value is not _ANY))
        if len(values) > 1:
            shown = [value.strip('"') for value in values]
            differences.append(f"{name} ({join_with_and(shown)})" if "." in name else name)
    token_counts: dict[Seed, set[str]] = {}  # of the runs of each seed
    for record in records:
        token_counts.setdefault(seed_of(record), set()).add(json.dumps(_token_counts(record)))
    if not differences and any(len(counts) > 1 for counts in token_counts.values()):
        differences.append("tokens, with equal seeds")
    return differences


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
    if len({(run.recipe["train"]["precision"], run.recipe.get("model", {}).get("attention")) for run in runs}) > 1:
        return "with a different precision or attention"
    return None
