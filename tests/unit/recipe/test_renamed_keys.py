"""Old recipe keys and values are refused, and the error has the new name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftbench.common.renamed_keys import MOVED_KEYS, RENAMED_KEYS, RENAMED_VALUES, REPLACED_SWITCHES
from peftbench.errors import OutOfRangeError, UnknownKeyError
from peftbench.recipe.loader import load_recipe, parse_recipe
from tests.helpers.recipe_files import REQUIRED_KEYS, write

METHOD_KIND_OF_KEY = {
    "lora_alpha": "lora",
    "lora_dropout": "lora",
    "num_virtual_tokens": "prompt_tuning",
    "prompt_tuning_init": "prompt_tuning",
    "prompt_tuning_init_text": "prompt_tuning",
    "head": "last_layer",
}
VALUES = [(key, old, new) for key, values in RENAMED_VALUES.items() for old, new in values.items()]


def method_override(key: str) -> list[str]:
    """Return the override that selects the method of ``key``, empty for keys of other groups."""
    kind = METHOD_KIND_OF_KEY.get(key.removeprefix("method."))
    return [f"method.kind={kind}"] if kind else []


@pytest.mark.parametrize("source", ["yaml", "override"])
@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_old_key_is_refused_with_its_new_name(old: str, new: str, source: str, least: Path, tmp_path: Path) -> None:
    """Every renamed key is an unknown key, and the error names the new key."""
    files, overrides = [least], method_override(new)
    if source == "yaml":
        section, key = old.split(".")
        files.append(write(tmp_path / "old.yaml", {section: {key: 1}}))
        files.append(write(tmp_path / "kind.yaml", "".join(f"method: {{kind: {o.split('=')[1]}}}" for o in overrides)))
        files, overrides = [files[0], files[2], files[1]] if overrides else files[:2], []
    else:
        overrides.append(f"{old}=1")
    with pytest.raises(UnknownKeyError, match=f"^Invalid recipe: there is no key '{old}'; it was renamed to '{new}'$"):
        load_recipe(files, overrides)


SOURCES_OF_KEYS = {
    "data.source.article": "hub",
    "data.source.summary": "hub",
    "data.source.article_tokens": "synthetic",
    "data.source.summary_tokens": "synthetic",
}


@pytest.mark.parametrize("selects_task", [True, False])
@pytest.mark.parametrize(("old", "new"), MOVED_KEYS.items())
def test_moved_key_is_refused_with_its_new_place(old: str, new: str, selects_task: bool, least: Path) -> None:
    """A key of the task is named with the kind of task that has it, whether the recipe selects it or not."""
    overrides = [f"{old}=x", *(["task.kind=summarization"] if selects_task else [])]
    if old in SOURCES_OF_KEYS:
        overrides.append(f"data.source.kind={SOURCES_OF_KEYS[old]}")
    kind = ", a key of task.kind=summarization" if new.startswith("task.") else ""
    sentence = f"^Invalid recipe: there is no key '{old}'; it was renamed to '{new}'{kind}$"
    with pytest.raises(UnknownKeyError, match=sentence):
        load_recipe([least], overrides)


def test_moved_keys_cover_everything_that_the_task_took_over() -> None:
    """The columns and the separator are keys of the task; the lengths of synthetic texts have other names."""
    assert set(MOVED_KEYS) == {*SOURCES_OF_KEYS, "data.separator"}
    assert [new.split(".")[0] for new in MOVED_KEYS.values()].count("task") == 3


@pytest.mark.parametrize(("key", "old", "new"), VALUES)
def test_old_value_is_refused_with_its_new_name(key: str, old: str, new: str, least: Path) -> None:
    """Every renamed value is refused with the new value; a value that differs only in case is accepted."""
    overrides = [*method_override(key), f"{key}={old}"]
    if old.upper() == new:
        text = ["method.prompt_tuning_init_text=a"] if new == "TEXT" else []
        assert load_recipe([least], overrides + text).method.model_dump()["prompt_tuning_init"] == new
        return
    with pytest.raises(OutOfRangeError, match=f"(?i)={old!r} is not an allowed value; it was renamed to '{new}'$"):
        load_recipe([least], overrides)


def test_old_key_of_another_method_gets_the_usual_hint() -> None:
    """The method full has neither the old nor the new key of lora, so the key is unknown."""
    values: dict[str, Any] = REQUIRED_KEYS | {"method": {"kind": "full", "alpha": 1}}
    with pytest.raises(UnknownKeyError, match=r"there is no key 'method\.alpha'; allowed: kind$"):
        parse_recipe(values)


@pytest.mark.parametrize("source", ["yaml", "override"])
@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("old", REPLACED_SWITCHES)
def test_replaced_switch_is_refused_with_the_values_of_its_new_key(
    old: str, value: str, source: str, least: Path, tmp_path: Path
) -> None:
    """The sentence has the new key's value for true and for false, and each of them is valid."""
    section, key = old.split(".")
    files = [least, *([write(tmp_path / "old.yaml", f"{section}: {{{key}: {value}}}")] if source == "yaml" else [])]
    with pytest.raises(UnknownKeyError) as caught:
        load_recipe(files, [f"{old}={value}"] if source == "override" else [])
    assert str(caught.value) == (
        "Invalid recipe: there is no key 'evaluate.generate'; use evaluate.metrics=null for true and "
        "evaluate.metrics=[] for false"
    )
    assert load_recipe([least], ["evaluate.metrics=null"]).evaluate.metrics is None
    assert load_recipe([least], ["evaluate.metrics=[]"]).evaluate.metrics == ()
    assert load_recipe([least], ["evaluate.metrics=[bleu,chrf]"]).evaluate.metrics == ("bleu", "chrf")
