"""Recipe settings and environment of runs: values, and the number of runs with each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from peftbench.common.nested_keys import flatten_keys
from peftbench.common.units import format_bytes
from peftbench.record import RunRecord

MAX_SHOWN_VALUES = 12
"""Maximum number of listed values of a setting."""

NAMING_KEYS = frozenset({"name", "output_dir"})
"""Recipe keys that name a run or its folder and do not change its results."""


@dataclass(frozen=True)
class Setting:
    """A recipe key or a property of the environment, with its values and the number of runs with each."""

    name: str
    runs_by_value: dict[str, int]

    @property
    def shown_values(self) -> list[tuple[str, int]]:
        """The first ``MAX_SHOWN_VALUES`` values, as (value, number of runs)."""
        return list(self.runs_by_value.items())[:MAX_SHOWN_VALUES]

    @property
    def num_hidden_values(self) -> int:
        """Number of values that are not shown."""
        return max(0, len(self.runs_by_value) - MAX_SHOWN_VALUES)

    @property
    def is_constant(self) -> bool:
        """True if all runs have the same value."""
        return len(self.runs_by_value) == 1


def recipe_settings(records: Sequence[RunRecord]) -> list[Setting]:
    """Return all dotted recipe keys, in recipe order; a run without the key counts under "–"."""
    recipes = [dict(flatten_keys(record.recipe)) for record in records]
    names = dict.fromkeys(name for recipe in recipes for name in recipe if name not in NAMING_KEYS)
    return [
        Setting(name, _count_values([_format_value(recipe[name]) if name in recipe else "–" for recipe in recipes]))
        for name in names
    ]


def environment_settings(records: Sequence[RunRecord]) -> list[Setting]:
    """Return device, engine, library versions, model and data fingerprints, and commit."""
    facts = [_environment_facts(record) for record in records]
    names = dict.fromkeys(name for run_facts in facts for name in run_facts)
    return [Setting(name, _count_values([run_facts.get(name) or "unknown" for run_facts in facts])) for name in names]


def _environment_facts(record: RunRecord) -> dict[str, str | None]:
    device, engine = record.device, record.engine
    memory = None if device.memory_bytes is None else format_bytes(device.memory_bytes)
    return {
        "device": f"{device.name} ({device.type})",
        "processes": str(device.num_processes),
        "device memory": memory,
        "engine": engine.name if engine else "none",
        "precision": engine.mixed_precision if engine else "none",
        "model": record.model_fingerprint or "none",
        "data": record.data_fingerprint,
        "examples": json.dumps(record.num_examples),
        "evaluated on": record.quality.split if record.quality else "nothing",
        "commit": record.git_commit,
        **record.library_versions,
    }


def _count_values(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


def _format_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
