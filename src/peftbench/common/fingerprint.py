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
    "model.dtype": "fp32",
    "train.feature_cache": None,
    "train.repeat_examples": False,
}
"""Dotted key: the value at which a run reproduces one made before the key existed, so that it stays out."""

EVALUATION_KEYS = ("evaluate", "data.test", "data.validation", "data.source.test", "data.source.validation")
"""Keys that change the evaluation and neither the training nor its measurements."""

MEASUREMENT_KEYS = ("profile", "budget", "train.micro_batch_size", "train.micro_batch_tokens")
"""Keys that change the measurements of a training, and not its steps: how a batch is cut and what is measured."""


def exclude_keys(*keys: str) -> dict[str, Any]:
    """Return ``NEUTRAL_VALUES`` without the values of ``keys``, for the fingerprint of a part of a run."""
    return NEUTRAL_VALUES | dict.fromkeys(keys, ANY_VALUE)


def drop_neutral_keys(recipe: Mapping[str, Any], neutral: Mapping[str, Any] = NEUTRAL_VALUES) -> dict[str, Any]:
    """Return a copy of ``recipe`` without the keys of ``neutral`` that have their neutral value.

    A new key with a neutral value therefore makes neither finished runs nor committed records stale.
    """
    values = dict(recipe)
    # Deepest first: a section is neutral after the neutral keys in it are dropped.
    for dotted, value in sorted(neutral.items(), key=lambda item: -item[0].count(".")):
        *parents, key = dotted.split(".")
        section: Any = values
        for parent in parents:
            if not isinstance(section.get(parent), Mapping):
                section = {}
                break
            section[parent] = dict(section[parent])  # a copy: the argument must not change
            section = section[parent]
        if key in section and (value is ANY_VALUE or section[key] == value):
            del section[key]
    return values


def add_neutral_keys(recipe: Mapping[str, Any], neutral: Mapping[str, Any] = NEUTRAL_VALUES) -> dict[str, Any]:
    """Return a copy of a recorded recipe with the neutral value of each key that did not exist when it ran.

    A key's default may be another value, and the recorded run must keep its own.
    """
    values = dict(recipe)
    for dotted, value in neutral.items():
        section, _, key = dotted.rpartition(".")
        if value is not ANY_VALUE and section in values and isinstance(values[section], Mapping):
            values[section] = {key: value} | dict(values[section])
    return values


def fingerprint_recipe(recipe: Mapping[str, Any], neutral: Mapping[str, Any] = NEUTRAL_VALUES) -> str:
    """Return the hash (16 hexadecimal digits) of every key of ``recipe`` (JSON values) that can change a number."""
    content = json.dumps(drop_neutral_keys(recipe, neutral), sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
