"""Recipes as files: merged as written, refused in one sentence, shown with every knob's meaning."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftbench.config import explained, load_recipe, merged, validate
from peftbench.errors import (
    MissingFileError,
    OutOfRangeError,
    RecipeError,
    UnknownKeyError,
    WrongTypeError,
)
from peftbench.methods import KINDS
from peftbench.optim import OPTIMIZERS, SGD, AdamW
from peftbench.part import Part
from peftbench.recipe import Recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
LEAST = {
    "name": "run",
    "method": {"kind": "lora"},
    "data": {"source": {"kind": "docstrings"}},
    "train": {"steps": 10},
}


def shipped_recipes() -> list[Path]:
    """Recipe files that say a run: neither the parents that others extend nor suites of recipes."""
    return [
        path
        for path in sorted(RECIPES.rglob("*.yaml"))
        if path.name != "common.yaml" and "recipes" not in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


SHIPPED = shipped_recipes()


def write(path: Path, values: dict[str, Any] | str) -> Path:
    """A YAML file of ``values``, or of text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def least(tmp_path: Path) -> Path:
    """A file with no more than a recipe must say."""
    return write(tmp_path / "least.yaml", LEAST)


# --- merging ---------------------------------------------------------------------------------------------------------


def test_files_and_overrides_merge_from_left_to_right(least: Path, tmp_path: Path) -> None:
    """A later file wins over an earlier one knob by knob, and an override over every file."""
    second = write(tmp_path / "b.yaml", {"train": {"steps": 20, "seed": 1, "global_batch": 4}})
    third = write(tmp_path / "c.yaml", {"train": {"steps": 30, "seed": 2}})
    recipe = load_recipe([least, second, third], ["train.steps=40", "train.steps=50"])
    assert (recipe.train.steps, recipe.train.seed, recipe.train.global_batch) == (50, 2, 4)
    assert load_recipe([least, third, second]).train.steps == 20


def test_a_list_is_replaced_not_extended(least: Path, tmp_path: Path) -> None:
    """A later list takes the place of an earlier one."""
    first = write(tmp_path / "a.yaml", {"method": {"target_modules": ["c_attn", "c_proj"]}})
    recipe = load_recipe([least, first], ["method.target_modules=[c_fc]"])
    assert recipe.method.model_dump()["target_modules"] == ("c_fc",)


def test_overrides_alone_make_a_recipe() -> None:
    """No file is needed where the overrides say everything."""
    overrides = ["name=run", "method.kind=full", "data.source.kind=docstrings", "train.epochs=2"]
    assert load_recipe([], overrides).train.epochs == 2.0


def test_an_override_says_null(least: Path) -> None:
    """``null`` takes back what a file says."""
    assert load_recipe([least], ["train.steps=null", "train.epochs=1"]).train.steps is None


def test_extends_is_relative_to_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file extends another by a path from its own folder, wherever the command runs, and wins over it."""
    write(tmp_path / "base" / "common.yaml", LEAST)
    child = write(tmp_path / "sub" / "child.yaml", {"extends": "../base/common.yaml", "train": {"steps": 3}})
    monkeypatch.chdir(tmp_path.parent)
    recipe = load_recipe([child])
    assert (recipe.train.steps, recipe.name) == (3, "run")


def test_extends_a_list_from_left_to_right(tmp_path: Path) -> None:
    """Of several parents the later wins, and a parent's own parents come before it."""
    write(tmp_path / "root.yaml", LEAST | {"train": {"steps": 1, "seed": 1, "global_batch": 1}})
    write(tmp_path / "a.yaml", {"extends": "root.yaml", "train": {"steps": 2, "seed": 2}})
    write(tmp_path / "b.yaml", {"train": {"steps": 3}})
    recipe = load_recipe([write(tmp_path / "child.yaml", {"extends": ["a.yaml", "b.yaml"]})])
    assert (recipe.train.steps, recipe.train.seed, recipe.train.global_batch) == (3, 2, 1)


def test_one_parent_by_two_ways_is_no_cycle(tmp_path: Path) -> None:
    """Two parents may share a parent of their own."""
    write(tmp_path / "root.yaml", LEAST)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.yaml", {"extends": "root.yaml"})
    assert load_recipe([write(tmp_path / "child.yaml", {"extends": ["a.yaml", "b.yaml"]})]).name == "run"


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    """Files that extend each other, or themselves, are refused by name instead of read for ever."""
    first = write(tmp_path / "a.yaml", LEAST | {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    itself = write(tmp_path / "c.yaml", LEAST | {"extends": "c.yaml"})
    for path in (first, itself):
        with pytest.raises(RecipeError, match=f"{path.name} extends itself"):
            load_recipe([path])


def test_a_parent_that_is_not_there(tmp_path: Path) -> None:
    """A missing parent is told by its path, with the file of its folder that may have been meant."""
    write(tmp_path / "common.yaml", LEAST)
    child = write(tmp_path / "child.yaml", {"extends": "comon.yaml"})
    with pytest.raises(MissingFileError, match=r"no file .*comon\.yaml; did you mean 'common\.yaml'"):
        load_recipe([child])


# --- shipped recipes and knobs ---------------------------------------------------------------------------------------


def test_recipes_are_shipped() -> None:
    """There are recipes for the tests below, one of each method among them."""
    assert len(SHIPPED) >= 6
    kinds = {load_recipe([path]).method.kind for path in SHIPPED}
    assert kinds >= {"full", "last_layer", "lora", "prompt_tuning", "lead", "zero_shot"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_shipped_recipe_is_one(path: Path, tmp_path: Path) -> None:
    """Every recipe file validates as it is, and what --print-config shows of it reads back as the same recipe."""
    recipe = load_recipe([path])
    again = load_recipe([write(tmp_path / "again.yaml", explained(recipe))])
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def all_knobs() -> Iterator[tuple[str, str]]:
    """Every knob that a recipe may have, as ``Class.name``, and its description."""
    tables: list[type[Part]] = [*KINDS.values(), *OPTIMIZERS.values()]
    from peftbench.data.sources import SOURCES

    waiting: list[type[Part]] = [Recipe, *tables, *SOURCES.values()]
    seen: set[type[Part]] = set()
    while waiting:
        part = waiting.pop()
        if part in seen:
            continue
        seen.add(part)
        for name, field in part.model_fields.items():
            yield f"{part.__name__}.{name}", field.description or ""
            if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
                waiting.append(field.annotation)


def test_every_knob_says_what_it_means() -> None:
    """Each knob of the recipe, of every method, source and optimizer has a description that fits one line."""
    knobs = dict(all_knobs())
    assert len(knobs) > 40
    assert {"Recipe.name", "Train.steps", "Lora.r", "Files.train", "Hub.revision", "AdamW.betas"} <= set(knobs)
    without = [knob for knob, meaning in knobs.items() if not meaning.strip() or "\n" in meaning.strip()]
    assert not without


def test_explained_shows_each_knob_with_its_meaning(least: Path) -> None:
    """Each knob stands on a line of its own, with its value and its meaning behind it."""
    lines = explained(load_recipe([least])).splitlines()
    assert all(re.fullmatch(r" *\w+:( .+)?  # \S.*", line) for line in lines)
    assert any(re.fullmatch(r"  steps: 10  # Optimizer steps.*", line) for line in lines)
    assert "    kind: docstrings  # Which source." in lines


@pytest.mark.parametrize(
    "override",
    [
        "data.separator='\n# not a comment: \"quoted\"'",
        "data.separator=' é 日本'",
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
def test_explained_reads_back(override: str, least: Path, tmp_path: Path) -> None:
    """Values that YAML could take for something else come back as they were."""
    recipe = load_recipe([least], [override])
    assert recipe != load_recipe([least])
    assert load_recipe([write(tmp_path / "again.yaml", explained(recipe))]) == recipe


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("5e-4", 5e-4), ("0.1", 0.1), ("1", 1.0), ("1E-3", 1e-3)])
def test_a_number_is_a_number_in_files_and_overrides(text: str, value: float, least: Path, tmp_path: Path) -> None:
    """``1e-4``, which plain YAML takes for text, is a float in a file as in an override."""
    file = write(tmp_path / "rate.yaml", f"optimizer: {{learning_rate: {text}}}\n")
    for recipe in (load_recipe([least, file]), load_recipe([least], [f"optimizer.learning_rate={text}"])):
        assert type(recipe.optimizer.learning_rate) is float
        assert recipe.optimizer.learning_rate == value


def test_an_optimizer_without_a_kind_is_the_default_one(least: Path) -> None:
    """Knobs alone are AdamW's; a kind is obeyed."""
    assert isinstance(load_recipe([least], ["optimizer.learning_rate=0.5"]).optimizer, AdamW)
    assert isinstance(load_recipe([least], ["optimizer.kind=sgd", "optimizer.momentum=0.5"]).optimizer, SGD)


def test_the_fingerprint_is_of_what_may_change_a_number(least: Path) -> None:
    """Where a run is written and shown does not change the fingerprint; any other knob does."""
    before = load_recipe([least]).fingerprint()
    elsewhere = ["name=other", "output_dir=there", "save_model=false", "trackers=[tensorboard]"]
    assert load_recipe([least], elsewhere).fingerprint() == before
    changes = ("train.seed=1", "method.r=8", "optimizer.learning_rate=1e-3", "data.train=5", "model.dropout=0.0")
    changed = {load_recipe([least], [change]).fingerprint() for change in changes}
    assert len(changed) == len(changes)
    assert before not in changed


def test_a_recipe_is_frozen(least: Path) -> None:
    """Nothing downstream edits a recipe."""
    recipe = load_recipe([least])
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 1  # type: ignore[misc]


def test_reading_a_recipe_needs_no_torch(least: Path) -> None:
    """A mistake in a recipe is told without waiting for torch to load."""
    code = (
        "import sys; from pathlib import Path; from peftbench.config import load_recipe; "
        "load_recipe([Path(sys.argv[1])]); "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code, str(least)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, type[RecipeError], str]] = [
    # Unknown and misspelt keys and names: the path, and the nearest of that group.
    ("train.gobal_batch=4", UnknownKeyError, "'train.gobal_batch'; did you mean 'global_batch'?"),
    ("trian.steps=4", UnknownKeyError, "'trian'; did you mean 'train'?"),
    ("method.rr=4", UnknownKeyError, "'method.rr'; "),
    ("method.alhpa=4", UnknownKeyError, "'method.alhpa'; did you mean 'alpha'?"),
    ("data.source.trian=x.csv", UnknownKeyError, "'data.source.trian'"),
    ("optimizer.learning_rat=1", UnknownKeyError, "'optimizer.learning_rat'; did you mean 'learning_rate'?"),
    ("evaluate.beam=2", UnknownKeyError, "'evaluate.beam'; did you mean 'beams'?"),
    ("method.kind=lorra", UnknownKeyError, "no method of kind 'lorra'; did you mean 'lora'?"),
    ("data.source.kind=hubb", UnknownKeyError, "no data.source of kind 'hubb'; did you mean 'hub'?"),
    ("optimizer.kind=adam", UnknownKeyError, "no optimizer of kind 'adam'; did you mean 'adamw'?"),
    # Wrong types, in each direction.
    ("train.steps=ten", WrongTypeError, "train.steps='ten' has the wrong type"),
    ("train.steps='10'", WrongTypeError, "train.steps='10' has the wrong type"),
    ("train.steps=true", WrongTypeError, "train.steps=True has the wrong type"),
    ("train.steps=1.5", WrongTypeError, "train.steps=1.5 has the wrong type"),
    ("train.gradient_checkpointing=1", WrongTypeError, "train.gradient_checkpointing=1 has the wrong type"),
    ("save_model='yes'", WrongTypeError, "save_model='yes' has the wrong type"),
    ("optimizer.learning_rate=fast", WrongTypeError, "optimizer.learning_rate='fast' has the wrong type"),
    ("name=1", WrongTypeError, "name=1 has the wrong type"),
    ("train=5", WrongTypeError, "train=5 has the wrong type"),
    ("model.path=[a]", WrongTypeError, "model.path=['a'] has the wrong type"),
    ("method.r=four", WrongTypeError, "method.r='four' has the wrong type"),
    # Out of range.
    ("train.steps=0", OutOfRangeError, "train.steps=0 must be greater than 0"),
    ("train.global_batch=-1", OutOfRangeError, "train.global_batch=-1 must be greater than 0"),
    ("model.dropout=1.0", OutOfRangeError, "model.dropout=1.0 must be less than 1"),
    ("optimizer.learning_rate=0.0", OutOfRangeError, "optimizer.learning_rate=0.0 must be greater than 0"),
    ("optimizer.learning_rate=.inf", OutOfRangeError, "optimizer.learning_rate"),
    ("optimizer.learning_rate=.nan", OutOfRangeError, "optimizer.learning_rate"),
    ("optimizer.betas=[0.9,1.0]", OutOfRangeError, "optimizer.betas.1=1.0 must be less than 1"),
    ("train.precision=bf6", OutOfRangeError, "train.precision='bf6' is not one of its values; did you mean 'bf16'?"),
    ("evaluate.split=train", OutOfRangeError, "evaluate.split='train' is not one of its values; allowed: validation"),
    ("trackers=[tensorbord]", OutOfRangeError, "trackers.0='tensorbord' is not one of its values; did you mean"),
    ("name=../elsewhere", OutOfRangeError, "name='../elsewhere': must start with a letter or digit"),
    ("data.separator='TL;DR: '", OutOfRangeError, "data.separator='TL;DR: ': must be a text that does not end in"),
    ("data.separator=''", OutOfRangeError, "data.separator='': must be a text"),
    # Knobs that contradict each other.
    ("train.epochs=2", OutOfRangeError, "train: needs exactly one of train.steps and train.epochs"),
    ("train.steps=null", OutOfRangeError, "train: needs exactly one of train.steps and train.epochs"),
    ("data.padding=max_tokens", OutOfRangeError, "data: padding to max_tokens needs data.max_tokens"),
]


def test_there_are_mistakes_of_every_kind() -> None:
    """The list below has each class of mistake in it."""
    assert {kind for _, kind, _ in MISTAKES} == {UnknownKeyError, WrongTypeError, OutOfRangeError}


@pytest.mark.parametrize(("override", "kind", "message"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_is_told_in_one_sentence(override: str, kind: type[RecipeError], message: str, least: Path) -> None:
    """A wrong knob is refused as what it is, in one line with its path, what was given and what is allowed."""
    with pytest.raises(RecipeError) as caught:
        load_recipe([least], [override])
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "method", "data", "train"])
def test_what_a_recipe_must_say(missing: str) -> None:
    """A recipe without its name, method, data or length is refused by the path that is missing."""
    with pytest.raises(RecipeError, match=f"^{missing} is missing; a recipe must say it$"):
        validate({key: value for key, value in LEAST.items() if key != missing})


def test_a_group_without_its_kind() -> None:
    """A method or a source without a kind is refused with the kinds there are."""
    with pytest.raises(RecipeError, match=r"^method\.kind is missing; allowed: full, .*lora"):
        validate(LEAST | {"method": {"r": 4}})
    with pytest.raises(RecipeError, match=r"^data\.source\.kind is missing; allowed: docstrings, files, hub$"):
        validate(LEAST | {"data": {"source": {}}})


def test_an_unknown_key_goes_before_what_it_explains() -> None:
    """Where a misspelt key leaves the right one missing, the misspelling is told."""
    values = {key: value for key, value in LEAST.items() if key != "name"}
    with pytest.raises(UnknownKeyError, match="'nam'; did you mean 'name'"):
        validate(values | {"nam": "run"})


def test_a_file_that_is_not_there(least: Path) -> None:
    """A missing file is told with the nearest name of its folder; a folder in its place too."""
    with pytest.raises(MissingFileError, match=r"no file .*lest\.yaml; did you mean 'least\.yaml'"):
        load_recipe([least.with_name("lest.yaml")])
    with pytest.raises(MissingFileError, match="there is no file"):
        load_recipe([least.parent])


def test_no_recipe_at_all() -> None:
    """Without file and override the sentence says how to give one."""
    with pytest.raises(RecipeError, match="no recipe was given; use --config"):
        load_recipe([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [unclosed", "is not valid YAML"),
        ("name: a\nname: b\n", "is not valid YAML"),
        ("- a\n- b\n", "must hold keys and values"),
        ("name: ${nothing.there}\n", "cannot be resolved"),
        ("name: ???\n", "cannot be resolved"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    """Broken YAML, a list or a reference to nothing is refused in one line."""
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe([write(tmp_path / "bad.yaml", text)])
    assert type(caught.value) is RecipeError
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A file that is not UTF-8 is refused as a file that is no YAML."""
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"bytes\.yaml is not valid YAML"):
        load_recipe([path])


def test_a_value_that_is_no_plain_value(least: Path, tmp_path: Path) -> None:
    """A date in a file is text, as in a name; a value of a kind that YAML files do not give is a wrong type."""
    assert load_recipe([least, write(tmp_path / "date.yaml", "name: 2026-01-02\n")]).name == "2026-01-02"
    with pytest.raises(WrongTypeError, match="neither text, number, switch nor list"):
        validate(LEAST | {"name": datetime.date(2026, 1, 2)})


@pytest.mark.parametrize("override", ["steps", "=5", "--steps"])
def test_an_override_that_is_none(override: str, least: Path) -> None:
    """An override without key or value is refused with an example of one."""
    with pytest.raises(RecipeError, match=r"is no override; write key\.sub=value"):
        load_recipe([least], [override])


def test_an_override_that_is_no_yaml(least: Path) -> None:
    """An override whose value cannot be read is refused, not passed on as text."""
    with pytest.raises(RecipeError, match="cannot read the overrides"):
        load_recipe([least], ["method.target_modules=[a"])


def test_merged_is_not_yet_validated(tmp_path: Path) -> None:
    """Files that say only part of a recipe can be merged and looked at."""
    part = write(tmp_path / "part.yaml", {"train": {"steps": 5}})
    assert merged([part], ["train.seed=3"]) == {"train": {"steps": 5, "seed": 3}}
