"""Scalars of YAML: a key that holds text takes what was written; ambiguous numbers are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.errors import UnknownKeyError, WrongTypeError
from peftbench.recipe.loader import load_recipe
from peftbench.suite.expand import expand, read_suite
from tests.helpers.recipe_files import REQUIRED_KEYS, write

TEXTS = ["off", "yes", "010", "1", "1.5", "1e3", "2024-01-01", "0x1F", "true", "1_000", "1:30"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["model.path", "model.revision", "data.source.kind=files data.source.train"])
def test_text_key_takes_what_was_written(text: str, key: str, least: Path) -> None:
    """Neither a number nor a boolean of YAML changes the characters, in overrides and in files."""
    *others, last = key.split()
    value = f"{text}.csv" if others else text
    recipe = load_recipe([least], [*others, f"{last}={value}"])
    section, name = (recipe.data.source, "train") if others else (recipe.model, last.removeprefix("model."))
    assert getattr(section, name) == value


@pytest.mark.parametrize("text", ["off", "010", "1", "1e3", "2024-01-01", "true"])
def test_name_in_a_file_is_taken_as_written(text: str, tmp_path: Path) -> None:
    """``name: off`` names a run "off"."""
    path = write(tmp_path / "a.yaml", "\n".join([f"name: {text}", "method: {kind: lora}", "train: {steps: 1}"]))
    assert load_recipe([path], ["data.source.kind=docstrings"]).name == text


def test_text_in_a_list_is_taken_as_written(least: Path) -> None:
    """Target modules that look like numbers stay text."""
    recipe = load_recipe([least], ["method.target_modules=[on, 1]"])
    assert recipe.method.target_modules == ("on", "1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=010", "train.steps=010 is ambiguous, since YAML reads it as 8; write 10 or 8"),
        ("train.steps=-010", "train.steps=-010 is ambiguous, since YAML reads it as -8; write -10 or -8"),
        ("train.steps=1:30", "train.steps=1:30 is ambiguous, since YAML reads it as 90"),
        ("optimizer.betas=[0.9, 01]", "is ambiguous"),
    ],
)
def test_ambiguous_number_is_refused(override: str, message: str, least: Path) -> None:
    """YAML reads octal and sexagesimal numbers that a person does not mean."""
    with pytest.raises(WrongTypeError, match=message):
        load_recipe([least], [override])


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("10", 10), ("1_000", 1000)])
def test_plain_number_is_accepted(text: str, value: int, least: Path) -> None:
    """A zero alone and underscores are clear."""
    assert load_recipe([least], [f"data.seed={text}"]).data.seed == value


def test_suite_name_is_taken_as_written(tmp_path: Path) -> None:
    """The same holds for the keys of a suite."""
    write(tmp_path / "a.yaml", REQUIRED_KEYS)
    assert read_suite(write(tmp_path / "s.yaml", "name: off\nrecipes: [a.yaml]\n")).name == "off"


def test_axes_and_sbatch_options_of_a_suite_are_taken_as_written(tmp_path: Path) -> None:
    """An axis over a text key keeps the text; an ambiguous number is refused; account 010 is not account 8."""
    write(tmp_path / "a.yaml", REQUIRED_KEYS)
    text = "name: s\nrecipes: [a.yaml]\n"
    path = write(
        tmp_path / "s.yaml", f"{text}slurm: {{account: 010, exclusive: true}}\naxes: {{model.revision: [off, 1.10]}}\n"
    )
    assert read_suite(path).slurm == {"account": "010", "exclusive": True}
    assert [recipe.model.revision for recipe in expand(path)] == ["off", "1.10"]
    with pytest.raises(WrongTypeError, match=r"train\.steps=010 is ambiguous"):
        expand(write(tmp_path / "t.yaml", f"{text}axes: {{train.steps: [010]}}\n"))
    with pytest.raises(UnknownKeyError, match=r"unknown key 'written_axes'"):
        read_suite(write(tmp_path / "u.yaml", f"{text}written_axes: {{}}\n"))
