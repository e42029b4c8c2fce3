"""Recipe files: merging, and YAML with a description of every key."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftbench.common.schema import ConfigSection
from peftbench.data.sources import SOURCES
from peftbench.errors import MissingFileError, RecipeError
from peftbench.methods import METHOD_KINDS
from peftbench.optim import OPTIMIZERS, SGD, AdamW
from peftbench.recipe.loader import load_recipe, merge_configs, to_commented_yaml
from peftbench.recipe.schema import Recipe
from peftbench.tasks import TASK_KINDS
from peftbench.tasks.summarization import Summarization
from tests.helpers.recipe_files import REQUIRED_KEYS, write


def test_files_and_overrides_merge_from_left_to_right(least: Path, tmp_path: Path) -> None:
    """A later file replaces single keys of an earlier one, and overrides replace those of files."""
    second = write(tmp_path / "b.yaml", {"train": {"steps": 20, "seed": 1, "global_batch_size": 4}})
    third = write(tmp_path / "c.yaml", {"train": {"steps": 30, "seed": 2}})
    recipe = load_recipe([least, second, third], ["train.steps=40", "train.steps=50"])
    assert (recipe.train.steps, recipe.train.seed, recipe.train.global_batch_size) == (50, 2, 4)
    assert load_recipe([least, third, second]).train.steps == 20


def test_list_is_replaced_not_extended(least: Path, tmp_path: Path) -> None:
    """A later list replaces an earlier one."""
    first = write(tmp_path / "a.yaml", {"method": {"target_modules": ["c_attn", "c_proj"]}})
    recipe = load_recipe([least, first], ["method.target_modules=[c_fc]"])
    assert recipe.method.model_dump()["target_modules"] == ("c_fc",)


def test_recipe_from_overrides_alone() -> None:
    """No file is needed if the overrides set every required key."""
    overrides = ["name=run", "method.kind=full", "data.source.kind=docstrings", "train.epochs=2"]
    assert load_recipe([], overrides).train.epochs == 2.0


def test_null_override_unsets_a_value(least: Path) -> None:
    """An override with ``null`` removes the value of a file."""
    assert load_recipe([least], ["train.steps=null", "train.epochs=1"]).train.steps is None


def test_extends_is_relative_to_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``extends`` is relative to the file's own folder, not the working directory; the file wins over its parent."""
    write(tmp_path / "base" / "common.yaml", REQUIRED_KEYS)
    child = write(tmp_path / "sub" / "child.yaml", {"extends": "../base/common.yaml", "train": {"steps": 3}})
    monkeypatch.chdir(tmp_path.parent)
    recipe = load_recipe([child])
    assert (recipe.train.steps, recipe.name) == (3, "run")


def test_extends_merges_a_list_from_left_to_right(tmp_path: Path) -> None:
    """A later parent wins over an earlier one, and a parent over its own parents."""
    write(tmp_path / "root.yaml", REQUIRED_KEYS | {"train": {"steps": 1, "seed": 1, "global_batch_size": 1}})
    write(tmp_path / "a.yaml", {"extends": "root.yaml", "train": {"steps": 2, "seed": 2}})
    write(tmp_path / "b.yaml", {"train": {"steps": 3}})
    recipe = load_recipe([write(tmp_path / "child.yaml", {"extends": ["a.yaml", "b.yaml"]})])
    assert (recipe.train.steps, recipe.train.seed, recipe.train.global_batch_size) == (3, 2, 1)


def test_shared_parent_is_not_a_cycle(tmp_path: Path) -> None:
    """Two parents may extend the same file."""
    write(tmp_path / "root.yaml", REQUIRED_KEYS)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.yaml", {"extends": "root.yaml"})
    assert load_recipe([write(tmp_path / "child.yaml", {"extends": ["a.yaml", "b.yaml"]})]).name == "run"


def test_cycle_is_refused(tmp_path: Path) -> None:
    """Files that extend each other, or themselves, are an error that names the file."""
    first = write(tmp_path / "a.yaml", REQUIRED_KEYS | {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    itself = write(tmp_path / "c.yaml", REQUIRED_KEYS | {"extends": "c.yaml"})
    for path in (first, itself):
        with pytest.raises(RecipeError, match=f"{path.name} extends itself"):
            load_recipe([path])


def test_missing_parent_is_refused(tmp_path: Path) -> None:
    """The error about a missing parent has its path and the nearest file of its folder."""
    write(tmp_path / "common.yaml", REQUIRED_KEYS)
    child = write(tmp_path / "child.yaml", {"extends": "comon.yaml"})
    with pytest.raises(MissingFileError, match=r"comon\.yaml' does not exist; did you mean 'common\.yaml'"):
        load_recipe([child])


# --- keys and their descriptions ----------------------------------------------------------------------------------


def all_keys() -> Iterator[tuple[str, str]]:
    """Yield each key of a recipe in the form ``Class.name``, with its description."""
    queue: list[type[ConfigSection]] = [Recipe, *METHOD_KINDS.values(), *OPTIMIZERS.values(), *SOURCES.values()]
    queue += TASK_KINDS.values()
    seen: set[type[ConfigSection]] = set()
    while queue:
        section = queue.pop()
        if section in seen:
            continue
        seen.add(section)
        for name, field in section.model_fields.items():
            yield f"{section.__name__}.{name}", field.description or ""
            if isinstance(field.annotation, type) and issubclass(field.annotation, ConfigSection):
                queue.append(field.annotation)


def test_every_key_has_a_description() -> None:
    """Each key of the recipe and of every method, source, task and optimizer has a description of one line."""
    keys = dict(all_keys())
    assert len(keys) > 40
    assert {"Recipe.name", "Train.steps", "Lora.r", "Files.train", "Hub.revision", "Chat.labels", "AdamW.betas"} <= set(
        keys
    )
    assert not [key for key, text in keys.items() if not text.strip() or "\n" in text.strip()]


def test_commented_yaml_has_one_line_per_key(least: Path) -> None:
    """Each key is on its own line, followed by its value and its description."""
    lines = to_commented_yaml(load_recipe([least])).splitlines()
    assert all(re.fullmatch(r" *\w+:( .+)?  # \S.*", line) for line in lines)
    assert any(re.fullmatch(r"  steps: 10  # Number of optimizer steps.*", line) for line in lines)
    assert "    kind: docstrings  # Kind of source." in lines


@pytest.mark.parametrize(
    "override",
    [
        "task={kind: summarization, separator: '\n# not a comment: \"quoted\"'}",
        "task={kind: completion, separator: ' é 日本'}",
        "task={kind: chat, chat_template: plain, labels: all}",
        "optimizer.learning_rate=1e-7",
        "optimizer.betas=[0.8,0.95]",
        "method.target_modules=['c_attn','mlp.c_fc']",
        "method.target_modules='.*\\.c_(attn|fc)'",
        "trackers=[tensorboard]",
        "model.dropout=0.1",
        "name='1e3'",
        "model.path='null'",
        "model.revision='0123'",
    ],
)
def test_commented_yaml_reads_back(override: str, least: Path, tmp_path: Path) -> None:
    """Values that YAML could read as another type are read back unchanged."""
    recipe = load_recipe([least], [override])
    assert recipe != load_recipe([least])
    assert load_recipe([write(tmp_path / "again.yaml", to_commented_yaml(recipe))]) == recipe


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("5e-4", 5e-4), ("0.1", 0.1), ("1", 1.0), ("1E-3", 1e-3)])
def test_number_is_a_float_in_files_and_overrides(text: str, value: float, least: Path, tmp_path: Path) -> None:
    """``1e-4``, which plain YAML reads as text, is a float in a file and in an override."""
    file = write(tmp_path / "rate.yaml", f"optimizer: {{learning_rate: {text}}}\n")
    for recipe in (load_recipe([least, file]), load_recipe([least], [f"optimizer.learning_rate={text}"])):
        assert type(recipe.optimizer.learning_rate) is float
        assert recipe.optimizer.learning_rate == value


def test_optimizer_without_a_kind_is_adamw(least: Path) -> None:
    """Without a kind, the keys are AdamW's."""
    assert isinstance(load_recipe([least], ["optimizer.learning_rate=0.5"]).optimizer, AdamW)
    assert isinstance(load_recipe([least], ["optimizer.kind=sgd", "optimizer.momentum=0.5"]).optimizer, SGD)


def test_recipe_is_frozen(least: Path) -> None:
    """A recipe cannot be modified."""
    recipe = load_recipe([least])
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 1  # type: ignore[misc]


def test_reading_a_recipe_needs_no_torch(least: Path) -> None:
    """Loading a recipe imports no torch, so errors are reported at once."""
    code = (
        "import sys; from pathlib import Path; from peftbench.recipe.loader import load_recipe; "
        "load_recipe([Path(sys.argv[1])]); "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(least)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "value", ["a ${b} c", "${data.seed}", "${", "1e3", "null", "a: b", "two\nlines", "#", "é '\"", r"\${b}"]
)
def test_commented_yaml_reads_back_any_text(value: str, tmp_path: Path) -> None:
    """Text that looks like an interpolation, a number or a comment is read back as the same text."""
    recipe = load_recipe([write(tmp_path / "least.yaml", REQUIRED_KEYS)]).model_copy(update={"output_dir": value})
    again = load_recipe([write(tmp_path / "explained.yaml", to_commented_yaml(recipe))])
    assert again.output_dir == value


def test_merge_accepts_partial_recipes(tmp_path: Path) -> None:
    """``merge_configs`` does not check that required keys are set."""
    part = write(tmp_path / "part.yaml", {"train": {"steps": 5}})
    assert merge_configs([part], ["train.seed=3"]) == {"train": {"steps": 5, "seed": 3}}


def test_recipe_of_a_record_can_be_loaded(tmp_path: Path) -> None:
    """A run's record gives its exact recipe, text that looks like an interpolation included; overrides apply."""
    first = load_recipe([], ["name=a", "method.kind=lora", "data.source.kind=docstrings", "train.steps=3"])
    odd = first.model_copy(update={"task": Summarization(separator="\n${name}:")})
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"recipe_fingerprint": "x", "recipe": odd.model_dump(mode="json"), "losses": [1.0]}))
    assert load_recipe([path]) == odd
    assert load_recipe([path], ["train.steps=9"]).train.steps == 9
    assert load_recipe([path]).fingerprint() == odd.fingerprint()
