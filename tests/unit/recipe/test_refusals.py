"""Recipes that cannot be meant: refused in one sentence."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from peftbench.errors import MissingFileError, OutOfRangeError, RecipeError, UnknownKeyError, WrongTypeError
from peftbench.recipe.loader import load_recipe, parse_recipe
from tests.unit.recipe.conftest import LEAST, write

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
    ("train=5", WrongTypeError, "train=5 has the wrong type; it must be a group of knobs"),
    ("method.target_modules=5", WrongTypeError, "method.target_modules=5 has the wrong type; it must be a list"),
    ("method.kind=[a]", UnknownKeyError, "there is no method of kind"),
    ("model.path=[a]", WrongTypeError, "model.path=['a'] has the wrong type"),
    ("method.r=four", WrongTypeError, "method.r='four' has the wrong type"),
    # Out of range.
    ("train.steps=0", OutOfRangeError, "train.steps=0 must be greater than 0"),
    ("train.seed=4294967296", OutOfRangeError, "train.seed=4294967296 must be less than 4294967296"),
    ("method.target_modules='c_attn('", OutOfRangeError, "method.target_modules='c_attn(': invalid regular expression"),
    ("train.global_batch_size=-1", OutOfRangeError, "train.global_batch_size=-1 must be greater than 0"),
    ("model.dropout=1.0", OutOfRangeError, "model.dropout=1.0 must be less than 1"),
    ("optimizer.learning_rate=0.0", OutOfRangeError, "optimizer.learning_rate=0.0 must be greater than 0"),
    ("optimizer.learning_rate=.inf", OutOfRangeError, "optimizer.learning_rate"),
    ("optimizer.learning_rate=.nan", OutOfRangeError, "optimizer.learning_rate"),
    ("optimizer.betas=[0.9,1.0]", OutOfRangeError, "optimizer.betas.1=1.0 must be less than 1"),
    ("train.precision=bf6", OutOfRangeError, "train.precision='bf6' is not one of its values; did you mean 'bf16'?"),
    ("evaluate.split=train", OutOfRangeError, "evaluate.split='train' is not one of its values; allowed: validation"),
    ("trackers=[tensorbord]", OutOfRangeError, "trackers.0='tensorbord' is not one of its values; did you mean"),
    ("profile.price_per_hour=0", OutOfRangeError, "profile.price_per_hour=0 must be greater than 0"),
    ("name=../elsewhere", OutOfRangeError, "name='../elsewhere': must start with a letter or digit"),
    ("data.separator='TL;DR: '", OutOfRangeError, "data.separator='TL;DR: ': must be a text that does not end in"),
    ("data.separator=''", OutOfRangeError, "data.separator='': must be a text"),
    # Knobs that contradict each other.
    ("train.epochs=2", OutOfRangeError, "train: needs exactly one of train.steps and train.epochs"),
    ("train.steps=null", OutOfRangeError, "train: needs exactly one of train.steps and train.epochs"),
    ("data.padding=max_length", OutOfRangeError, "data: padding to max_tokens needs data.max_length"),
    ("data={padding: max_length, max_tokens: 9, pad_to_multiple_of: 8}", OutOfRangeError, "makes all rows one width"),
    ("data.pad_to_multiple_of=0", OutOfRangeError, "greater than 0"),
    ("train.feature_cache=fp32", OutOfRangeError, "a frozen trunk gives, and this lora has none; use last_layer with"),
    ("train.feature_cache=fp16", OutOfRangeError, "train.feature_cache='fp16' is not one of its values"),
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
        parse_recipe({key: value for key, value in LEAST.items() if key != missing})


@pytest.mark.parametrize("extends", ["5", "", "[5]", "{a: b}"])
def test_extends_that_names_no_file(extends: str, tmp_path: Path) -> None:
    """What a recipe builds on is a path or a list of paths."""
    with pytest.raises(WrongTypeError, match=r"extends in .* must be the path of a file or a list"):
        load_recipe([write(tmp_path / "a.yaml", f"extends: {extends}\nname: a\n")])


def test_a_group_without_its_kind() -> None:
    """A method or a source without a kind is refused with the kinds there are."""
    with pytest.raises(RecipeError, match=r"^method\.kind is missing; allowed: full, .*lora"):
        parse_recipe(LEAST | {"method": {"r": 4}})
    with pytest.raises(
        RecipeError, match=r"^data\.source\.kind is missing; allowed: docstrings, files, hub, synthetic$"
    ):
        parse_recipe(LEAST | {"data": {"source": {}}})


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"method": {"kind": "last_layer", "head": "tied"}}, "this last_layer has none; use last_layer with"),
        ({"method": {"kind": "zero_shot"}}, "this zero_shot has none"),
        (
            {"data": LEAST["data"] | {"label_padding": True}},
            "data.label_padding=true labels padding; set one of the two",
        ),
        ({"train": {"steps": 1, "feature_cache": "bf16", "logits": "all"}}, "and train.logits=all wants more; set"),
    ],
    ids=["head", "baseline", "as_published", "logits"],
)
def test_a_trunk_that_cannot_be_kept(knobs: dict[str, Any], message: str) -> None:
    """Only what is the same in every epoch can be, and it is told before anything is loaded."""
    values = LEAST | {"method": {"kind": "last_layer"}, "train": {"steps": 1, "feature_cache": "bf16"}}
    assert parse_recipe(values).train.feature_cache == "bf16"
    with pytest.raises(OutOfRangeError) as caught:
        parse_recipe(values | knobs)
    assert message in str(caught.value)


def test_an_unknown_key_goes_before_what_it_explains() -> None:
    """Where a misspelt key leaves the right one missing, the misspelling is told."""
    values = {key: value for key, value in LEAST.items() if key != "name"}
    with pytest.raises(UnknownKeyError, match="'nam'; did you mean 'name'"):
        parse_recipe(values | {"nam": "run"})


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
        parse_recipe(LEAST | {"name": datetime.date(2026, 1, 2)})


@pytest.mark.parametrize("override", ["steps", "=5", "--steps"])
def test_an_override_that_is_none(override: str, least: Path) -> None:
    """An override without key or value is refused with an example of one."""
    with pytest.raises(RecipeError, match=r"is no override; write key\.sub=value"):
        load_recipe([least], [override])


def test_an_override_that_is_no_yaml(least: Path) -> None:
    """An override whose value cannot be read is refused, not passed on as text."""
    with pytest.raises(RecipeError, match="cannot read the overrides"):
        load_recipe([least], ["method.target_modules=[a"])


def test_a_breakdown_needs_a_step_of_its_own(least: Path) -> None:
    """It is made in the last warm-up step, and in the first there are no optimizer states yet."""
    for steps in (0, 1):
        with pytest.raises(OutOfRangeError, match="a breakdown needs warmup_steps of 2 or more"):
            load_recipe([least], ["profile.memory_breakdown=true", f"profile.untimed_steps={steps}"])
    assert load_recipe([least], ["profile.memory_breakdown=true", "profile.untimed_steps=2"]).profile.memory_breakdown
