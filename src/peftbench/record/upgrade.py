"""Upgrade records of earlier schemas, one schema at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peftbench.record import schema_v1, schema_v2

_Values = dict[str, Any]

_RECORD_UPGRADES: dict[int, Callable[[_Values], _Values]] = {
    1: schema_v1.upgrade_record_v1,
    2: schema_v2.upgrade_record_v2,
}
_RECIPE_UPGRADES: dict[int, Callable[[_Values], _Values]] = {
    1: schema_v1.upgrade_recipe_v1,
    2: schema_v2.upgrade_recipe_v2,
}
"""Schema version: the function that returns the values in the next schema."""


def upgrade_record(values: _Values) -> _Values:
    """Return a record (parsed JSON) of any earlier schema in the current one."""
    while (upgrade := _get_upgrade(_RECORD_UPGRADES, values.get("schema_version"))) is not None:
        values = upgrade(values)
    return values


def upgrade_recipe(values: _Values, schema_version: object) -> _Values:
    """Return the resolved recipe of a record with ``schema_version`` in the current schema."""
    while (upgrade := _get_upgrade(_RECIPE_UPGRADES, schema_version)) is not None:
        assert isinstance(schema_version, int)
        values, schema_version = upgrade(values), schema_version + 1
    return values


def _get_upgrade(
    upgrades: dict[int, Callable[[_Values], _Values]], schema_version: object
) -> Callable[[_Values], _Values] | None:
    return upgrades.get(schema_version) if isinstance(schema_version, int) else None
