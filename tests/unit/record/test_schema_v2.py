"""Records of schema 2 are read as records of the current schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from peftbench.common.fingerprint import add_neutral_keys, fingerprint_recipe
from peftbench.recipe.loader import load_recipe
from peftbench.recipe.schema import Recipe
from peftbench.record import SCHEMA_VERSION, RunRecord, read_record
from peftbench.record.rewrite import rewrite_records
from peftbench.report.diff.compute import diff_suites
from peftbench.report.tables.table import markdown_table
from tests.helpers.paths import RECORD_V2
from tests.helpers.scores import DEFINITIONS

NAMES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def read_changed(tmp_path: Path, **changes: Any) -> RunRecord:
    """Return the record of schema 2 with changed fields, as it is read."""
    values = json.loads(RECORD_V2.read_text()) | changes
    (tmp_path / "record.json").write_text(json.dumps(values), encoding="utf-8")
    return read_record(tmp_path / "record.json")


def test_v2_record_has_its_scores_with_their_definitions(tmp_path: Path) -> None:
    """Intervals and values of the examples are unchanged; the definitions are those of the metric today."""
    old, quality = json.loads(RECORD_V2.read_text())["quality"], read_record(RECORD_V2).quality
    assert quality is not None
    assert list(quality.metrics) == NAMES
    assert {name: score.interval.model_dump() for name, score in quality.metrics.items()} == old["rouge"]
    assert {name: score.definition for name, score in quality.metrics.items()} == {
        name: DEFINITIONS[name] for name in NAMES
    }
    assert quality.headline_metric == "rougeL"
    assert quality.per_example is not None
    assert {name: list(values) for name, values in quality.per_example.metrics.items()} == old["per_example"]["rouge"]
    assert [sample.prompt for sample in quality.samples] == [sample["article"] for sample in old["samples"]]
    forced = old | {"teacher_forced_argmax_rouge": {"rougeL": {"mean": 7.0, "low": 6.0, "high": 8.0}}}
    upgraded = read_changed(tmp_path, quality=forced).quality
    assert upgraded is not None
    assert upgraded.teacher_forced_metrics["rougeL"].interval.mean == 7.0


def test_v2_record_without_generation_has_no_scores(tmp_path: Path) -> None:
    """Its recipe has no metrics, and it has no headline metric."""
    old = json.loads(RECORD_V2.read_text())
    recipe = old["recipe"] | {"evaluate": old["recipe"]["evaluate"] | {"generate": False}}
    quality = old["quality"] | {"rouge": None, "samples": [], "per_example": None}
    record = read_changed(tmp_path, recipe=recipe, quality=quality, recipe_fingerprint=fingerprint_recipe(recipe))
    assert record.quality is not None
    assert (record.quality.metrics, record.quality.headline_metric) == ({}, None)
    upgraded = Recipe.model_validate(add_neutral_keys(record.recipe))
    assert upgraded.evaluate.metrics == ()
    assert record.recipe_fingerprint == upgraded.fingerprint()
    assert read_changed(tmp_path, quality=None).quality is None


def test_fingerprint_is_that_of_the_new_keys(tmp_path: Path) -> None:
    """A suite that finished before counts as finished; a fingerprint of another recipe is not replaced."""
    record = read_record(RECORD_V2)
    assert record.recipe_fingerprint == Recipe.model_validate(add_neutral_keys(record.recipe)).fingerprint()
    assert load_recipe([RECORD_V2], []).fingerprint() == record.recipe_fingerprint
    assert read_changed(tmp_path, recipe_fingerprint="0123456789abcdef").recipe_fingerprint == "0123456789abcdef"


@pytest.mark.parametrize("value", [None, "yes", 3, [True]])
def test_switch_of_a_wrong_type_is_not_replaced(value: object, tmp_path: Path) -> None:
    """A recipe that was edited by hand is read, and its validation names the key."""
    old = json.loads(RECORD_V2.read_text())["recipe"]
    record = read_changed(tmp_path, recipe=old | {"evaluate": old["evaluate"] | {"generate": value}})
    assert record.recipe["evaluate"]["generate"] == value


def test_v2_record_has_the_same_table_and_no_difference_to_its_upgrade(tmp_path: Path) -> None:
    """Report and compare read a record of schema 2; rewriting it a second time changes no byte."""
    for side in ("A", "B"):
        (tmp_path / side / "run").mkdir(parents=True)
        shutil.copy(RECORD_V2, tmp_path / side / "run" / "record.json")
    assert rewrite_records(tmp_path / "B") == 1
    path = tmp_path / "B" / "run" / "record.json"
    first = path.read_bytes()
    assert json.loads(first)["schema_version"] == SCHEMA_VERSION
    assert rewrite_records(tmp_path / "B") == 1
    assert path.read_bytes() == first
    records = [read_record(tmp_path / side / "run" / "record.json") for side in ("A", "B")]
    assert markdown_table(records[:1]) == markdown_table(records[1:])
    diff = diff_suites(tmp_path / "A", tmp_path / "B")
    assert (len(diff.runs), diff.regressed, diff.changed) == (1, False, False)
