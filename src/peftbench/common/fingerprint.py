"""Fingerprints of files and of a resolved recipe: which keys are part of it, and at which values they are not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftbench.common.nested_keys import flatten_keys

ANY_VALUE = object()
"""The key is never part of the fingerprint."""

NEUTRAL_VALUES: dict[str, Any] = {
    "name": ANY_VALUE,
    "output_dir": ANY_VALUE,
    "save_model": ANY_VALUE,
    "trackers": ANY_VALUE,
    "checkpoint": {},
    "checkpoint.interval": ANY_VALUE,
    "checkpoint.keep_latest": ANY_VALUE,
    "checkpoint.keep_best": False,
    "early_stopping": {"patience": None, "min_delta": 0.0},
    "early_stopping.allow_unequal_steps": ANY_VALUE,
    "evaluate.interval": None,
    "evaluate.interval_metrics": False,
    "evaluate.general_text": None,
    "profile.price_per_hour": ANY_VALUE,
    "budget": {"memory": None},
    "model.dtype": "fp32",
    "train.feature_cache": None,
    "train.repeat_examples": False,
    "evaluate.metrics": None,
    "evaluate.headline_metric": None,
}
"""Dotted key: the value at which a run reproduces one made before the key existed, so that it stays out."""

EVALUATION_KEYS = ("evaluate", "data.test", "data.validation", "data.source.test", "data.source.validation")
"""Keys that change the evaluation and neither the training nor its measurements."""

INTERVAL_KEYS = ("evaluate.interval", "evaluate.interval_metrics")
"""Keys in ``EVALUATION_KEYS`` of the evaluation during training: they change what a training records."""

SELECTION_KEYS = ("evaluate.interval", "data.validation", "data.source.validation")
"""Keys in ``EVALUATION_KEYS`` that change the saved weights if the held-out loss during training selects them."""

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


def fingerprint_training(recipe: Mapping[str, Any]) -> str:
    """Return the hash of every key of ``recipe`` (JSON values) that can change a saved weight."""
    return fingerprint_recipe(_with_selection(recipe), exclude_keys(*EVALUATION_KEYS, *MEASUREMENT_KEYS))


def fingerprint_measured_training(recipe: Mapping[str, Any]) -> str:
    """Return the hash of every key of ``recipe`` that can change a saved weight or a measurement of the training."""
    keys = dict(flatten_keys(recipe))
    during_training = {
        key: keys[key] for key in INTERVAL_KEYS if keys.get(key, NEUTRAL_VALUES[key]) != NEUTRAL_VALUES[key]
    }
    values = {**_with_selection(recipe), **({"during_training": during_training} if during_training else {})}
    return fingerprint_recipe(values, exclude_keys(*EVALUATION_KEYS))


def _with_selection(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``recipe`` that has the ``SELECTION_KEYS`` apart from its sections, if they matter."""
    keys = dict(flatten_keys(recipe))
    if not keys.get("checkpoint.keep_best") and keys.get("early_stopping.patience") is None:
        return dict(recipe)
    return {**recipe, "selection": {key: keys.get(key) for key in SELECTION_KEYS}}


def hash_file(digest: hashlib.blake2b, path: Path) -> None:
    """Add the bytes of a file to ``digest``, in blocks.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        hashlib.file_digest(file, lambda: digest)


def may_be_equal(first: str | None, second: str | None) -> bool:
    """Return whether two fingerprints are equal, or one is unknown."""
    return None in {first, second} or first == second
