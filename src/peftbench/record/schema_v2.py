"""Upgrade records of schema 2 to schema 3, which has scores of any metric and examples of any task."""

from __future__ import annotations

from typing import Any

from peftbench.common.fingerprint import NEUTRAL_VALUES, fingerprint_recipe
from peftbench.common.renamed_keys import MOVED_KEYS, REPLACED_SWITCHES, TASK_OF_SCHEMA_2

_Values = dict[str, Any]

_QUALITY = {"rouge": "metrics", "teacher_forced_argmax_rouge": "teacher_forced_metrics"}
_PER_EXAMPLE = {"rouge": "metrics"}
_SPLIT_OVERLAP = {"texts_with_summary": "texts_with_reference"}
_SAMPLE = {"article": "prompt"}
_TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
_HEADLINE_METRIC = "rougeL"


def upgrade_record_v2(values: _Values) -> _Values:
    """Return a record of schema 2 (parsed JSON) as one of schema 3.

    The recipe's fingerprint is computed again from the new keys, but only if the old one matches the old keys.
    """
    record = values | {"schema_version": 3}
    if isinstance(record.get("quality"), dict):
        record["quality"] = _upgrade_quality(record["quality"])
    if isinstance(record.get("split_overlap"), dict):
        record["split_overlap"] = _rename(record["split_overlap"], _SPLIT_OVERLAP)
    old_recipe = record.get("recipe") or {}
    record["recipe"] = upgrade_recipe_v2(old_recipe)
    if record.get("recipe_fingerprint") == fingerprint_recipe(old_recipe, NEUTRAL_VALUES):
        record["recipe_fingerprint"] = fingerprint_recipe(record["recipe"])
    return record


def upgrade_recipe_v2(values: _Values) -> _Values:
    """Return a resolved recipe of schema 2 with the keys of schema 3."""
    recipe = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    for old, (new, replacements) in REPLACED_SWITCHES.items():
        section, key = old.split(".")
        if isinstance(recipe.get(section), dict) and isinstance(recipe[section].get(key), bool):
            recipe[section][new.split(".")[1]] = replacements[recipe[section].pop(key)]
    return _add_task(recipe)


def _add_task(recipe: Values) -> Values:
    """Return the recipe with the task that every recipe of schema 2 had, and its keys moved there."""
    if not isinstance(recipe.get("data"), dict):
        return recipe
    task = TASK_OF_SCHEMA_2 | {}
    for old, new in MOVED_KEYS.items():
        *sections, key = old.split(".")
        section: Any = recipe
        for name in sections:
            if isinstance(section.get(name), dict):
                section[name] = dict(section[name])
            section = section.get(name) or {}
        if key in section:
            value = section.pop(key)
            if new.startswith("task."):
                task[new.removeprefix("task.")] = value
            else:
                section[new.rpartition(".")[2]] = value
    return recipe | {"task": task}


def _upgrade_quality(values: _Values) -> _Values:
    quality = _rename(values, _QUALITY)
    for name in _QUALITY.values():
        quality[name] = {kind: _upgrade_score(kind, interval) for kind, interval in (quality.get(name) or {}).items()}
    quality["headline_metric"] = _HEADLINE_METRIC if _HEADLINE_METRIC in quality["metrics"] else None
    quality["samples"] = [_rename(sample, _SAMPLE) for sample in quality.get("samples") or ()]
    if quality.get("per_example"):
        quality["per_example"] = _rename(quality["per_example"], _PER_EXAMPLE)
    return quality


def _upgrade_score(kind: str, interval: _Values) -> _Values:
    """Return the interval with the definition of its score."""
    title = _TITLES[kind]
    definition = {
        "title": title,
        "description": f"{kind} F-measure of generated text, in percent",
        "unit": title,
        "digits": 1,
        "higher_is_better": True,
        "low": 0,
        "high": 100,
    }
    return {"interval": interval, "definition": definition}


def _rename(values: _Values, names: dict[str, str]) -> _Values:
    return {names.get(name, name): value for name, value in values.items()}
