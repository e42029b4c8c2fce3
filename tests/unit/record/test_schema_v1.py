"""Records of schema 1 are read as records of the current schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peftbench.common.fingerprint import add_neutral_keys, fingerprint_recipe
from peftbench.common.renamed_keys import RENAMED_KEYS, RENAMED_VALUES
from peftbench.recipe.loader import load_recipe
from peftbench.recipe.schema import Recipe
from peftbench.record import SCHEMA_VERSION, RunRecord, read_record
from peftbench.record.rewrite import rewrite_records
from peftbench.record.schema_v1 import upgrade_recipe_v1
from peftbench.report.diff.compute import diff_suites
from peftbench.report.tables.table import markdown_table
from tests.helpers.paths import RECORD_V1


def test_every_number_of_a_v1_record_is_kept() -> None:
    """The upgrade changes names only."""

    def leaves(values: object) -> list[str]:
        if isinstance(values, dict):
            return [leaf for value in values.values() for leaf in leaves(value)]
        if isinstance(values, (list, tuple)):
            return [leaf for value in values for leaf in leaves(value)]
        return [repr(values)] if isinstance(values, (int, float)) and not isinstance(values, bool) else []

    old = json.loads(RECORD_V1.read_text())
    new = json.loads(read_record(RECORD_V1).model_dump_json())
    for scores in (new["quality"]["metrics"], new["quality"]["teacher_forced_metrics"]):
        for score in scores.values():
            del score["definition"]
    old["schema_version"] = new["schema_version"] = 0
    assert len(leaves(old)) > 500
    assert sorted(leaves(old)) == sorted(leaves(new))


def test_v1_record_reads_under_the_new_names() -> None:
    """Values have the new names, and the fingerprint is that of the renamed recipe."""
    old, record = json.loads(RECORD_V1.read_text()), read_record(RECORD_V1)
    assert record.schema_version == SCHEMA_VERSION
    assert record.flops.model_flops == old["flops"]["required"]
    assert record.data_fingerprint == old["data_identity"]
    assert record.memory["train"].rss_bytes == old["memory"]["train"]["resident_bytes"]
    assert record.recipe["method"]["lora_alpha"] == old["recipe"]["method"]["alpha"]
    assert record.recipe["train"]["logits"] == "labels_only"
    recipe = Recipe.model_validate(add_neutral_keys(record.recipe))
    assert record.recipe_fingerprint == fingerprint_recipe(record.recipe) == recipe.fingerprint()


def test_v1_record_of_another_recipe_keeps_its_fingerprint(tmp_path: Path) -> None:
    """A fingerprint that does not match the recipe in the record is not replaced."""
    values = json.loads(RECORD_V1.read_text()) | {"recipe_fingerprint": "0123456789abcdef"}
    (tmp_path / "record.json").write_text(json.dumps(values))
    assert read_record(tmp_path / "record.json").recipe_fingerprint == "0123456789abcdef"


def test_every_renamed_key_is_upgraded() -> None:
    """Each old key, set to a unique value, is renamed to the new key."""
    for kind in ("lora", "prompt_tuning"):
        old: dict[str, dict[str, object]] = {"method": {"kind": kind}}
        keys_of_kind = {"lora": ("alpha", "dropout"), "prompt_tuning": ("tokens", "init", "init_text")}[kind]
        names = [name for name in RENAMED_KEYS if not name.startswith("method.") or name.split(".")[1] in keys_of_kind]
        for name in names:
            section, key = name.split(".")
            old.setdefault(section, {})[key] = name
        new = upgrade_recipe_v1(old)
        for name in names:
            section, key = RENAMED_KEYS[name].split(".")
            assert new[section][key] == name
        assert len(names) > 15


def test_every_renamed_value_is_upgraded() -> None:
    """Each old value of the map becomes the new one."""
    assert RENAMED_VALUES
    for name, values in RENAMED_VALUES.items():
        section, key = name.split(".")
        for old, new in values.items():
            assert upgrade_recipe_v1({section: {"kind": "last_layer", key: old}})[section][key] == new


def test_rewriting_is_idempotent(tmp_path: Path) -> None:
    """A record is rewritten once; a second time changes no byte."""
    path = tmp_path / "record.json"
    path.write_bytes(RECORD_V1.read_bytes())
    assert rewrite_records(tmp_path) == 1
    first = path.read_bytes()
    assert RunRecord.model_validate_json(first).schema_version == SCHEMA_VERSION
    assert rewrite_records(tmp_path) == 1
    assert path.read_bytes() == first


def test_run_of_a_v1_record_is_repeated() -> None:
    """The record is a recipe file; its old keys are read under the new names."""
    recipe = load_recipe([RECORD_V1], ["train.steps=30"])
    assert recipe.train.steps == 30
    assert load_recipe([RECORD_V1], []).fingerprint() == read_record(RECORD_V1).recipe_fingerprint


def test_v1_record_has_the_same_table_and_no_difference_to_its_upgrade(tmp_path: Path) -> None:
    """Report and compare read a record of schema 1."""
    for side in ("A", "B"):
        (tmp_path / side / "run").mkdir(parents=True)
        shutil.copy(RECORD_V1, tmp_path / side / "run" / "record.json")
    assert rewrite_records(tmp_path / "B") == 1
    records = [read_record(tmp_path / side / "run" / "record.json") for side in ("A", "B")]
    assert markdown_table(records[:1]) == markdown_table(records[1:])
    diff = diff_suites(tmp_path / "A", tmp_path / "B")
    assert (len(diff.runs), diff.regressed, diff.changed) == (1, False, False)
    assert len(diff.runs[0].metrics) > 5
