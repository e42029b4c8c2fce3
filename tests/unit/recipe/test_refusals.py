"""Invalid recipes are refused in one sentence."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from peftbench.errors import MissingFileError, OutOfRangeError, RecipeError, UnknownKeyError, WrongTypeError
from peftbench.recipe.loader import load_recipe, parse_recipe
from tests.helpers.recipe_files import REQUIRED_KEYS, write

MISTAKES: list[tuple[str, type[RecipeError], str]] = [
    # Unknown and misspelled keys and kinds: the path, and the nearest name in that group.
    ("train.gobal_batch=4", UnknownKeyError, "'train.gobal_batch'; did you mean 'train.global_batch_size'?"),
    ("trian.steps=4", UnknownKeyError, "'trian'; did you mean 'train'?"),
    ("method.rr=4", UnknownKeyError, "'method.rr'; "),
    ("method.alhpa=4", UnknownKeyError, "'method.alhpa'; did you mean 'method.lora_alpha'?"),
    ("data.source.trian=x.csv", UnknownKeyError, "'data.source.trian'"),
    ("optimizer.learning_rat=1", UnknownKeyError, "'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'?"),
    ("evaluate.beam=2", UnknownKeyError, "'evaluate.beam'; did you mean 'evaluate.num_beams'?"),
    ("method.kind=lorra", UnknownKeyError, "no method of kind 'lorra'; did you mean 'lora'?"),
    ("data.source.kind=hubb", UnknownKeyError, "no data.source of kind 'hubb'; did you mean 'hub'?"),
    ("task.kind=sumarization", UnknownKeyError, "no task of kind 'sumarization'; did you mean 'summarization'?"),
    ("task={kind: text, separator: x}", UnknownKeyError, "there is no key 'task.separator'; allowed: kind, text"),
    ("task={kind: chat, labels: asistant}", OutOfRangeError, "task.labels='asistant' is not an allowed value; did you"),
    ("optimizer.kind=adam", UnknownKeyError, "no optimizer of kind 'adam'; did you mean 'adamw'?"),
    # Wrong types, in each direction.
    ("train.steps=ten", WrongTypeError, "train.steps='ten' has the wrong type"),
    ("train.steps='10'", WrongTypeError, "train.steps='10' has the wrong type"),
    ("train.steps=true", WrongTypeError, "train.steps=true has the wrong type"),
    ("train.steps=1.5", WrongTypeError, "train.steps=1.5 has the wrong type"),
    ("train.gradient_checkpointing=1", WrongTypeError, "train.gradient_checkpointing=1 has the wrong type"),
    ("save_model='yes'", WrongTypeError, "save_model='yes' has the wrong type"),
    ("optimizer.learning_rate=fast", WrongTypeError, "optimizer.learning_rate='fast' has the wrong type"),
    ("train=5", WrongTypeError, "train=5 has the wrong type; it must be a group of keys"),
    ("method.target_modules={a: b}", WrongTypeError, "method.target_modules has the wrong type; it must be a list"),
    ("method.kind=[a]", UnknownKeyError, "there is no method of kind"),
    ("model.path=[a]", WrongTypeError, 'model.path=["a"] has the wrong type'),
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
    ("train.precision=bf6", OutOfRangeError, "train.precision='bf6' is not an allowed value; did you mean 'bf16'?"),
    ("evaluate.split=train", OutOfRangeError, "evaluate.split='train' is not an allowed value; allowed: validation"),
    ("trackers=[tensorbord]", OutOfRangeError, "trackers.0='tensorbord' is not an allowed value; did you mean"),
    ("profile.price_per_hour=0", OutOfRangeError, "profile.price_per_hour=0 must be greater than 0"),
    ("evaluate.interval=0", OutOfRangeError, "evaluate.interval=0: must be a number of steps, e.g. 50, a part of an"),
    ("evaluate.interval=0.0ep", OutOfRangeError, "evaluate.interval='0.0ep': must be a number of steps"),
    ("evaluate.interval=1.5", OutOfRangeError, "evaluate.interval=1.5: must be a number of steps"),
    ("evaluate.interval=true", OutOfRangeError, "evaluate.interval=true: must be a number of steps"),
    ("evaluate.interval=often", OutOfRangeError, "evaluate.interval='often': must be a number of steps"),
    (
        "evaluate.interval_metrics=true",
        OutOfRangeError,
        "interval_metrics=true needs evaluate.interval and metrics",
    ),
    ("evaluate.general_text={path: a, colum: b}", UnknownKeyError, "did you mean 'evaluate.general_text.column'"),
    (
        "evaluate.general_text={path: a, rows: 0}",
        OutOfRangeError,
        "evaluate.general_text.rows=0 must be greater than 0",
    ),
    ("evaluate.general_text=a.md", OutOfRangeError, "evaluate.general_text='a.md': must be \"shipped\", the path of a"),
    (
        "checkpoint.keep_best=true",
        OutOfRangeError,
        "keep_best=true needs the held-out loss during training; set evaluate.",
    ),
    (
        "early_stopping.patience=2",
        OutOfRangeError,
        "early_stopping.patience needs the held-out loss during training; set",
    ),
    ("early_stopping.min_delta=1.0", OutOfRangeError, "min_delta needs early_stopping.patience; set both or neither"),
    ("name=../elsewhere", OutOfRangeError, "name='../elsewhere': must start with a letter or digit"),
    (
        "task={kind: summarization, separator: 'TL;DR: '}",
        OutOfRangeError,
        "task.separator='TL;DR: ': must be non-empty text that does not end in",
    ),
    ("task={kind: summarization, separator: ''}", OutOfRangeError, "task.separator='': must be non-empty text"),
    # Keys that contradict each other.
    ("train.epochs=2", OutOfRangeError, "train: set exactly one of train.steps and train.epochs"),
    ("train.steps=null", OutOfRangeError, "train: set exactly one of train.steps and train.epochs"),
    ("data.padding=max_length", OutOfRangeError, "data: padding=max_length needs data.max_length"),
    (
        "data={padding: max_length, max_length: 9, pad_to_multiple_of: 8}",
        OutOfRangeError,
        "gives all rows the same width",
    ),
    ("data.pad_to_multiple_of=0", OutOfRangeError, "greater than 0"),
    (
        "train.feature_cache=fp32",
        OutOfRangeError,
        "only upper layers of the base model, and this lora does not; use last_blocks, select, or",
    ),
    ("data.source={kind: synthetic, prompt_tokens: [1]}", OutOfRangeError, "must be a list of at least 2 values"),
    ("train.feature_cache=fp16", OutOfRangeError, "train.feature_cache='fp16' is not an allowed value"),
    (
        "schedule.warmup_steps=10",
        OutOfRangeError,
        "schedule.warmup_steps=10 must be less than the number of",
    ),
    (
        "schedule.warmup_steps=300",
        OutOfRangeError,
        "schedule.warmup_steps=300 must be less than the number of",
    ),
    ("name=" + 256 * "a", OutOfRangeError, "has 256 characters, and the name of a folder may have 255; shorten it"),
    ("train.feature_cache=true", OutOfRangeError, "train.feature_cache=true is not an allowed value; allowed: fp32"),
]


def test_mistakes_cover_every_error_class() -> None:
    """The list has each class of error in it."""
    assert {kind for _, kind, _ in MISTAKES} == {UnknownKeyError, WrongTypeError, OutOfRangeError}


@pytest.mark.parametrize(("override", "kind", "message"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistake_is_refused_in_one_sentence(override: str, kind: type[RecipeError], message: str, least: Path) -> None:
    """The error has its own class and one line with the path, the invalid value and the allowed ones."""
    with pytest.raises(RecipeError) as caught:
        load_recipe([least], [override])
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.startswith("Invalid recipe: ")
    assert message in text
    assert not [term for term in ("\n", "pydantic", "OmegaConf", "Input", "dictionary", "Tuple") if term in text]


@pytest.mark.parametrize("missing", ["name", "method", "data", "train"])
def test_missing_required_key_is_refused(missing: str) -> None:
    """A recipe without its name, method, data or length is refused with the path of the missing key."""
    with pytest.raises(RecipeError, match=f"^Invalid recipe: {missing} is missing; set it$"):
        parse_recipe({key: value for key, value in REQUIRED_KEYS.items() if key != missing})


@pytest.mark.parametrize("extends", ["5", "", "[5]", "{a: b}"])
def test_extends_must_be_a_path_or_paths(extends: str, tmp_path: Path) -> None:
    """``extends`` is a path or a list of paths."""
    with pytest.raises(WrongTypeError, match=r"extends in .* must be the path of a file or a list"):
        load_recipe([write(tmp_path / "a.yaml", f"extends: {extends}\nname: a\n")])


def test_group_without_a_kind_is_refused() -> None:
    """A method or a source without a kind is refused with the allowed kinds."""
    with pytest.raises(RecipeError, match=r"^Invalid recipe: method\.kind is missing; allowed: full, .*lora"):
        parse_recipe(REQUIRED_KEYS | {"method": {"r": 4}})
    with pytest.raises(
        RecipeError,
        match=r"^Invalid recipe: data\.source\.kind is missing; allowed: docstrings, .*, files, hub, synthetic$",
    ):
        parse_recipe(REQUIRED_KEYS | {"data": {"source": {}}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": {"kind": "last_layer", "head": "tied"}},
            "and this last_layer does not; use last_blocks, select, or last_layer with",
        ),
        ({"method": {"kind": "zero_shot"}}, "and this zero_shot does not"),
        (
            {"data": REQUIRED_KEYS["data"] | {"label_padding": True}},
            "data.label_padding=true needs more; set one of the two",
        ),
        ({"train": {"steps": 1, "feature_cache": "bf16", "logits": "all"}}, "and train.logits=all needs more; set"),
        (
            {"method": {"kind": "last_blocks"}, "data": REQUIRED_KEYS["data"] | {"label_padding": True}},
            "stores hidden states of real tokens only, and data.label_padding=true needs more",
        ),
    ],
    ids=["head", "baseline", "label_padding", "logits", "blocks"],
)
def test_feature_cache_needs_a_frozen_part(values: dict[str, Any], message: str) -> None:
    """Settings whose hidden states cannot be cached are refused before anything is loaded."""
    cached = REQUIRED_KEYS | {"method": {"kind": "last_layer"}, "train": {"steps": 1, "feature_cache": "bf16"}}
    assert parse_recipe(cached).train.feature_cache == "bf16"
    with pytest.raises(OutOfRangeError) as caught:
        parse_recipe(cached | values)
    assert message in str(caught.value)


def test_misspelled_key_is_reported_before_the_missing_one() -> None:
    """If a required key is misspelled, the error is about the misspelled key."""
    values = {key: value for key, value in REQUIRED_KEYS.items() if key != "name"}
    with pytest.raises(UnknownKeyError, match="'nam'; did you mean 'name'"):
        parse_recipe(values | {"nam": "run"})


def test_missing_file_is_refused(least: Path) -> None:
    """The error has the nearest name in the folder; a folder in place of a file counts as missing."""
    with pytest.raises(MissingFileError, match=r"lest\.yaml' does not exist; did you mean 'least\.yaml'"):
        load_recipe([least.with_name("lest.yaml")])
    with pytest.raises(MissingFileError, match="is a folder; pass the path of a YAML file"):
        load_recipe([least.parent])


def test_empty_input_is_refused() -> None:
    """Without files and overrides the error names the option to use."""
    with pytest.raises(RecipeError, match=r"no recipe was given; pass a YAML file, e\.g\. recipes/demo"):
        load_recipe([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [unclosed", "is not valid YAML"),
        ("name: a\nname: b\n", "is not valid YAML"),
        ("- a\n- b\n", "must have keys and values"),
        ("name: ${nothing.there}\n", "cannot be resolved"),
        ("name: ???\n", "cannot be resolved"),
    ],
)
def test_file_without_a_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """Broken YAML, a list, or a reference to a missing key is refused in one line, without OmegaConf's message."""
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe([write(tmp_path / "bad.yaml", text)])
    assert type(caught.value) is RecipeError
    assert not [term for term in ("\n", "full_key", "object_type") if term in str(caught.value)]


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """The error reports invalid YAML."""
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"bytes\.yaml is not valid YAML"):
        load_recipe([path])


def test_date_in_a_file_is_text(least: Path, tmp_path: Path) -> None:
    """A date object passed by a program has the wrong type."""
    assert load_recipe([least, write(tmp_path / "date.yaml", "name: 2026-01-02\n")]).name == "2026-01-02"
    with pytest.raises(WrongTypeError, match="2026-01-02 has type date; a value must be text, a number"):
        parse_recipe(REQUIRED_KEYS | {"name": datetime.date(2026, 1, 2)})


@pytest.mark.parametrize("override", ["steps", "=5", "--steps"])
def test_override_without_key_or_value_is_refused(override: str, least: Path) -> None:
    """The error has an example of a valid override."""
    with pytest.raises(RecipeError, match=r"is not a valid override; write key\.sub=value"):
        load_recipe([least], [override])


def test_override_with_invalid_yaml_is_refused(least: Path) -> None:
    """A value that cannot be parsed is not used as text."""
    with pytest.raises(RecipeError, match="cannot read the overrides"):
        load_recipe([least], ["method.target_modules=[a"])


def test_memory_breakdown_needs_two_untimed_steps(least: Path) -> None:
    """The breakdown is measured in the last untimed step; the first step has no optimizer states yet."""
    for steps in (0, 1):
        with pytest.raises(OutOfRangeError, match="memory_breakdown=true needs untimed_steps of at least 2"):
            load_recipe([least], ["profile.memory_breakdown=true", f"profile.untimed_steps={steps}"])
    assert load_recipe([least], ["profile.memory_breakdown=true", "profile.untimed_steps=2"]).profile.memory_breakdown
