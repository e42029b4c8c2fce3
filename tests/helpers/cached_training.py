"""Recipes that train a head over cached hidden states."""

from __future__ import annotations

from typing import Any

from peftbench.feature_cache.store import StorageDtype
from peftbench.methods.last_layer import LastLayer
from peftbench.optim import AdamW
from peftbench.recipe.schema import Profile, Recipe
from tests.helpers.workshop import Workshop

EPOCHS, BATCH = 3, 6


def recipe(workshop: Workshop, name: str, stored: StorageDtype | None, **parts: Any) -> Recipe:
    """Return a recipe that trains a head for three epochs, in two micro-batches per step."""
    train = {
        "steps": None,
        "epochs": EPOCHS,
        "global_batch_size": BATCH,
        "micro_batch_size": 3,
        "feature_cache": stored,
    }
    train |= parts.pop("train", {})
    values: dict[str, Any] = {
        "optimizer": AdamW(learning_rate=1e-2),
        "profile": Profile(untimed_steps=1),
        "save_model": True,
    } | parts
    return workshop.recipe(LastLayer(), train=train, name=name, **values)
