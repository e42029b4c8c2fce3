"""Fingerprint of a resolved recipe: which keys are part of it, and at which values they are not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

ANY_VALUE = object()
"""The key is never part of the fingerprint."""

NEUTRAL_VALUES: dict[str, Any] = {
    "name": ANY_VALUE,
    "output_dir": ANY_VALUE,
    "save_model": ANY_VALUE,
    "trackers": ANY_VALUE,
    "checkpoint": ANY_VALUE,
    "profile.price_per_hour": ANY_VALUE,
    "budget": {"memory": None},
    "train.feature_cache": None,
}
"""Dotted key: the value at which a run reproduces one made before the key existed, so that it stays out."""


def fingerprint_recipe(recipe: Mapping[str, Any], neutral: Mapping[str, Any] = NEUTRAL_VALUES) -> str:
    """Return the hash (16 hexadecimal digits) of every key of ``recipe`` (JSON values) that can change a number.

    A key of ``neutral`` is left out at its neutral value. A new key with a neutral value therefore makes neither
    finished runs nor committed records stale.
    """
    values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in recipe.items()}
    for dotted, value in neutral.items():
        *parents, key = dotted.split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent, {})
        if key in section and (value is ANY_VALUE or section[key] == value):
            del section[key]
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
