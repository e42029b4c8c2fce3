"""Upgrade records of schema 1, whose fields and recipe keys had other names, to schema 2."""

from __future__ import annotations

from typing import Any

from peftbench.common.fingerprint import NEUTRAL_VALUES, fingerprint_recipe
from peftbench.common.renamed_keys import RENAMED_KEYS, RENAMED_VALUES

Fields = dict[str, str]

_RECORD: Fields = {
    "versions": "library_versions",
    "git": "git_commit",
    "model_identity": "model_fingerprint",
    "data_identity": "data_fingerprint",
    "examples": "num_examples",
    "dropped": "num_dropped_examples",
    "losses": "step_losses",
    "warmup_steps": "untimed_steps",
    "part_seconds": "step_part_seconds",
    "timed_steps": "part_timed_steps",
    "context_bytes": "cuda_context_bytes",
    "breakdown": "memory_breakdown",
}
_MEMORY: Fields = {
    "allocation_retries": "num_alloc_retries",
    "resident_bytes": "rss_bytes",
    "resident_baseline_bytes": "baseline_rss_bytes",
}
_STATE_BYTES: Fields = {"offloaded": "cpu_offloaded"}
_SECTIONS: dict[str, Fields] = {
    "outcome": {
        "part": "step_part",
        "held_bytes": "in_use_bytes",
        "needed_bytes": "estimated_peak_bytes",
        "snapshot": "memory_snapshot",
    },
    "device": {"kind": "type", "processes": "num_processes"},
    "engine": {
        "kind": "distributed_type",
        "model": "model_class",
        "optimizer": "optimizer_class",
        "micro_batch": "micro_batch_size",
        "accumulation": "gradient_accumulation_steps",
        "threads": "num_threads",
    },
    "state_bytes": _STATE_BYTES,
    "memory_breakdown": {
        "rows": "micro_batch_size",
        "width": "sequence_length",
        "bytes_by_kind": "bytes_by_category",
        "part": "step_part",
    },
    "tokens": {"labelled": "labeled"},
    "throughput": {"data_share": "data_time_fraction"},
    "throughput.tokens_per_second": {"labelled": "labeled"},
    "flops": {"required": "model_flops", "executed": "hardware_flops"},
    "flops.counted_step": {"counted": "counted_flops", "closed_form": "closed_form_flops"},
    "compute": {
        "required_per_second": "model_flops_per_second",
        "executed_per_second": "hardware_flops_per_second",
        "peak_per_second": "peak_flops_per_second",
        "achievable_per_second": "matmul_flops_per_second",
    },
    "quality": {"examples": "num_examples", "by_example": "per_example"},
    "quality.per_example": {"identity": "examples_fingerprint", "labelled": "labeled_tokens"},
}
"""New field names by section of the record, in order: a nested section follows the one it is in."""

_NEW_KEYS = {new: old for old, new in RENAMED_KEYS.items()}
_NEUTRAL_VALUES = {_NEW_KEYS.get(key, key): value for key, value in NEUTRAL_VALUES.items()}
"""The neutral values under the keys of schema 1."""


def upgrade_record_v1(values: dict[str, Any]) -> dict[str, Any]:
    """Return a record of schema 1 (parsed JSON) as one of schema 2.

    The recipe's fingerprint is recomputed from the renamed keys, but only if the old one matches the old keys.
    """
    record = _rename(values, _RECORD) | {"schema_version": 2}
    for path, fields in _SECTIONS.items():
        *parents, name = path.split(".")
        section: Any = record
        for parent in parents:
            section = section.get(parent) or {}
        if isinstance(section.get(name), dict):
            section[name] = _rename(section[name], fields)
    for name in ("memory", "step_memory"):
        record[name] = _rename_each(record.get(name) or {})
    for name in ("memory_by_rank", "step_memory_by_rank"):
        record[name] = [_rename_each(phases) for phases in record.get(name) or ()]
    record["state_bytes_by_rank"] = [_rename(one, _STATE_BYTES) for one in record.get("state_bytes_by_rank") or ()]
    old_recipe = record.get("recipe") or {}
    record["recipe"] = upgrade_recipe_v1(old_recipe)
    if record.get("recipe_fingerprint") == fingerprint_recipe(old_recipe, _NEUTRAL_VALUES):
        record["recipe_fingerprint"] = fingerprint_recipe(record["recipe"])
    return record


def upgrade_recipe_v1(values: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe of schema 1 with the keys and values of schema 2."""
    recipe = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    kind = recipe["method"].get("kind") if isinstance(recipe.get("method"), dict) else None
    for old, new in RENAMED_KEYS.items():
        section, key = old.split(".")
        if section == "method" and not _belongs_to(kind, key):
            continue
        if isinstance(recipe.get(section), dict) and key in recipe[section]:
            recipe[section] = _rename(recipe[section], {key: new.split(".")[1]})
    for name, renamed in RENAMED_VALUES.items():
        section, key = name.split(".")
        if isinstance(recipe.get(section), dict):
            value = recipe[section].get(key)
            if isinstance(value, str) and value in renamed:
                recipe[section][key] = renamed[value]
    return recipe


def _belongs_to(kind: str | None, key: str) -> bool:
    return key in {"lora": ("alpha", "dropout"), "prompt_tuning": ("tokens", "init", "init_text")}.get(kind or "", ())


def _rename(values: dict[str, Any], fields: Fields) -> dict[str, Any]:
    return {fields.get(name, name): value for name, value in values.items()}


def _rename_each(phases: dict[str, Any]) -> dict[str, Any]:
    return {phase: _rename(memory, _MEMORY) for phase, memory in phases.items()}
