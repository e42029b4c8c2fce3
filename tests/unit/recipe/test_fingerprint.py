"""Fingerprints of recipes: which keys are part of one, and which values are left out."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from peftbench.common.fingerprint import (
    ANY_VALUE,
    NEUTRAL_VALUES,
    fingerprint_measured_training,
    fingerprint_recipe,
    fingerprint_training,
)
from peftbench.recipe.loader import load_recipe
from peftbench.recipe.schema import Recipe
from peftbench.record import SCHEMA_VERSION
from tests.helpers.paths import REPOSITORY

REQUIRED = ["name=run", "method.kind=lora", "data.source.kind=docstrings", "train.steps=10"]
FULL: dict[str, Any] = load_recipe([], REQUIRED).model_dump(mode="json")


def with_value(dotted: str, value: object) -> dict[str, Any]:
    """Return a copy of the recipe with ``value`` at a dotted key."""
    recipe = copy.deepcopy(FULL)
    section, (*parents, key) = recipe, dotted.split(".")
    for parent in parents:
        section = section[parent]
    section[key] = value
    return recipe


def without_key(dotted: str) -> dict[str, Any]:
    """Return a copy of the recipe without a dotted key."""
    recipe = with_value(dotted, None)
    section, (*parents, key) = recipe, dotted.split(".")
    for parent in parents:
        section = section[parent]
    del section[key]
    return recipe


@pytest.mark.parametrize("dotted", NEUTRAL_VALUES)
def test_neutral_value_stays_out_of_the_fingerprint(dotted: str) -> None:
    """Only another value than the neutral one changes the fingerprint; with ``ANY_VALUE`` no value does."""
    neutral = NEUTRAL_VALUES[dotted]
    before = fingerprint_recipe(without_key(dotted))
    other = fingerprint_recipe(with_value(dotted, "another value"))
    if neutral is ANY_VALUE:
        assert before == other == fingerprint_recipe(FULL)
    else:
        assert before == fingerprint_recipe(with_value(dotted, neutral))
        assert before != other


def test_new_key_with_a_neutral_value_keeps_old_fingerprints() -> None:
    """A key added to a section, or a new section, leaves fingerprints of earlier recipes valid."""
    neutral = NEUTRAL_VALUES | {"train.new": 0, "new": {"a": 1}}
    assert fingerprint_recipe(with_value("train.new", 0) | {"new": {"a": 1}}, neutral) == fingerprint_recipe(FULL)
    assert fingerprint_recipe(with_value("train.new", 1), neutral) != fingerprint_recipe(FULL)


def test_new_key_in_a_neutral_section_keeps_old_fingerprints() -> None:
    """A section is neutral if it has its neutral value apart from its own neutral keys."""
    neutral = NEUTRAL_VALUES | {"budget.target": 0}
    assert fingerprint_recipe(with_value("budget.target", 0), neutral) == fingerprint_recipe(FULL)
    assert fingerprint_recipe(with_value("budget.target", 1), neutral) != fingerprint_recipe(FULL)


def test_fingerprint_recipe_leaves_its_argument_unchanged() -> None:
    """The function deletes keys only from a copy."""
    recipe = {"name": "a", "train": {"feature_cache": None, "steps": 1}}
    fingerprint_recipe(recipe)
    assert recipe == {"name": "a", "train": {"feature_cache": None, "steps": 1}}


def test_every_other_key_changes_the_fingerprint() -> None:
    """Each key of the recipe that is not in the list is part of the fingerprint."""
    sections = [(name, value) for name, value in FULL.items() if isinstance(value, dict)]
    keys = [f"{name}.{key}" for name, value in sections for key in value] + list(FULL)
    expected = [key for key in keys if key not in NEUTRAL_VALUES]
    assert len(expected) > 40
    before = fingerprint_recipe(FULL)
    assert [key for key in expected if fingerprint_recipe(with_value(key, "another value")) == before] == []


OLD_SECTIONS = {"checkpoint": {"interval": 5, "keep_latest": 1}}


def test_recipe_without_the_newer_keys_has_the_same_fingerprint() -> None:
    """A recipe of a record that was written before early stopping existed is that of a run without it."""
    old = copy.deepcopy(FULL) | OLD_SECTIONS
    del old["early_stopping"]
    for key in ("interval", "interval_metrics", "general_text"):
        del old["evaluate"][key]
    for fingerprint in (fingerprint_recipe, fingerprint_training, fingerprint_measured_training):
        assert fingerprint(old) == fingerprint(FULL)


INTERVAL = ["evaluate.interval=2"]
SELECTIONS = {
    "keep_best": [*INTERVAL, "checkpoint.keep_best=true"],
    "patience": [*INTERVAL, "early_stopping.patience=2"],
}


def load(*overrides: str) -> Recipe:
    """Return a recipe with overrides."""
    return load_recipe([], [*REQUIRED, *overrides])


def test_evaluation_during_training_changes_no_trained_weight() -> None:
    """A checkpoint of a training fits the same training with another interval; the measured training has a curve."""
    plain, evaluated, other = load(), load(*INTERVAL), load(*INTERVAL, "data.validation=3")
    assert plain.fingerprint_training() == evaluated.fingerprint_training() == other.fingerprint_training()
    assert plain.fingerprint_measured_training() != evaluated.fingerprint_measured_training()
    assert evaluated.fingerprint_measured_training() == other.fingerprint_measured_training()
    general = load("evaluate.general_text=shipped")
    assert general.fingerprint_measured_training() == plain.fingerprint_measured_training()


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_selection_is_part_of_the_training(selection: list[str]) -> None:
    """If the held-out loss selects the saved weights, what determines it changes the training's fingerprint."""
    selected = load(*selection)
    variants = [
        load(*INTERVAL),
        load(*selection, "evaluate.interval=3"),
        load(*selection, "data.validation=3"),
        selected,
    ]
    assert len({recipe.fingerprint_training() for recipe in variants}) == len(variants)
    assert len({recipe.fingerprint_measured_training() for recipe in variants}) == len(variants)
    assert load(*selection, "evaluate.batch_size=3").fingerprint_training() == selected.fingerprint_training()


STALE_RECORDS = {f"benchmarks/eight_bit/records/{name}" for name in ("adamw", "adamw8bit", "all_in_8bit")}
"""Records of runs whose recipe had other keys; benchmarks/eight_bit reads their numbers only."""


def test_committed_records_have_the_fingerprint_of_their_recipe() -> None:
    """No committed record is stale, apart from the listed ones."""
    paths = [*REPOSITORY.glob("docs/results/**/record.json"), *REPOSITORY.glob("benchmarks/*/records/**/record.json")]
    assert len(paths) > 50
    stale = set()
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["schema_version"] == SCHEMA_VERSION
        if record["recipe_fingerprint"] != fingerprint_recipe(record["recipe"]):
            stale.add(str(path.parent.relative_to(REPOSITORY)))
    assert stale == STALE_RECORDS
