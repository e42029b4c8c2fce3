"""Expansion of a suite file into its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.errors import MissingFileError, OutOfRangeError, RecipeError, UnknownKeyError, WrongTypeError
from peftbench.suite.expand import expand, resolve_accelerate_config
from tests.helpers.paths import REPOSITORY

SUITES = sorted(
    path for path in (REPOSITORY / "recipes").rglob("*.yaml") if "\nrecipes:" in path.read_text(encoding="utf-8")
)
COMMON = """
data: {source: {kind: docstrings}}
train: {steps: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two recipes that extend one file."""
    (tmp_path / "common.yaml").write_text(COMMON)
    for name in ("full", "lora"):
        (tmp_path / f"{name}.yaml").write_text(f"extends: common.yaml\nname: {name}\nmethod: {{kind: {name}}}\n")
    return tmp_path


def write_suite(folder: Path, text: str) -> Path:
    """Write a suite file next to the recipes and return its path."""
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def test_shipped_suites_are_found() -> None:
    """The list of shipped suites is not empty."""
    assert {path.parent.name for path in SUITES} >= {"demo", "study", "gpt2_cnn_dm"}


@pytest.mark.parametrize("path", SUITES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_suite_expands(path: Path) -> None:
    """A shipped suite expands to valid recipes with unique names."""
    names = [recipe.name for recipe in expand(path)]
    assert names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", [p for p in SUITES if p.parent.name == "gpt2_cnn_dm"], ids=lambda path: path.stem)
def test_fair_suite_varies_only_method_and_learning_rate(path: Path) -> None:
    """Two runs of the fair suite differ only in name, method and learning rate."""
    dumps = [recipe.model_dump(mode="json") for recipe in expand(path)]
    for dump in dumps:
        dump.pop("name")
        dump.pop("method")
        dump["optimizer"].pop("learning_rate")
    assert len(dumps) > 3
    assert all(dump == dumps[0] for dump in dumps)


def test_every_recipe_runs_with_every_axis_value(folder: Path) -> None:
    """All combinations of axes are expanded, and a run's name contains its values."""
    path = write_suite(folder, "name: s\nrecipes: [full.yaml, lora.yaml]\naxes: {train.seed: [0, 1], data.seed: [5]}\n")
    recipes = expand(path)
    assert [r.name for r in recipes] == [f"{m}-seed={s}-seed=5" for m in ("full", "lora") for s in (0, 1)]
    assert [(r.train.seed, r.data.seed) for r in recipes] == [(0, 5), (1, 5)] * 2


def test_command_line_overrides_the_suite(folder: Path) -> None:
    """Overrides of the command line win over the suite's, and --out wins over both."""
    path = write_suite(folder, "name: s\nrecipes: [full.yaml]\noverrides: [train.steps=3, output_dir=a]\n")
    (recipe,) = expand(path, ["train.steps=4"], Path("b c"))
    assert (recipe.train.steps, recipe.output_dir) == (4, "b c")


def test_seeds_repeat_only_trained_runs(folder: Path) -> None:
    """A recipe that trains is repeated with consecutive seeds, and its name contains the seed; a baseline runs once."""
    (folder / "lora.yaml").write_text("extends: common.yaml\nname: lora\nmethod: {kind: lora}\ntrain: {seed: 7}\n")
    for kind in ("zero_shot", "lead"):
        (folder / f"{kind}.yaml").write_text(f"extends: common.yaml\nname: {kind}\nmethod: {{kind: {kind}}}\n")
    path = write_suite(folder, "name: s\nrecipes: [zero_shot.yaml, lead.yaml, full.yaml, lora.yaml]\n")
    recipes = expand(path, seeds=3)
    assert [(r.name, r.train.seed) for r in recipes] == [
        ("zero_shot", 0),
        ("lead", 0),
        *((f"full-seed={s}", s) for s in (0, 1, 2)),
        *((f"lora-seed={s}", s) for s in (7, 8, 9)),
    ]


def test_seeds_equal_a_seed_axis(folder: Path) -> None:
    """--seeds gives the same recipes as an axis over train.seed, and an override sets the first seed."""
    by_axis = write_suite(folder, "name: s\nrecipes: [full.yaml]\naxes: {data.seed: [5], train.seed: [3, 4]}\n")
    expected = expand(by_axis)
    path = write_suite(folder, "name: s\nrecipes: [full.yaml]\naxes: {data.seed: [5]}\n")
    assert expand(path, ["train.seed=3"], seeds=2) == expected


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("axes: {train.seed: [0, 1]}\n", [], "already has an axis train.seed; leave --seeds out"),
        ("", ["train.seed=4294967295"], "seed"),
    ],
)
def test_invalid_seeds_are_refused(folder: Path, text: str, overrides: list[str], message: str) -> None:
    """A seed axis with --seeds, and a seed beyond the maximum, are refused."""
    with pytest.raises(OutOfRangeError, match=message):
        expand(write_suite(folder, f"name: s\nrecipes: [full.yaml]\n{text}"), overrides, seeds=2)


def test_duplicate_names_are_refused(folder: Path) -> None:
    """Two runs with one name would write to the same folder."""
    with pytest.raises(RecipeError, match="are named full"):
        expand(write_suite(folder, "name: s\nrecipes: [full.yaml, full.yaml]\n"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("name: s\nrecipe: [full.yaml]\n", UnknownKeyError, "did you mean 'recipes'"),
        ("name: s\nrecipes: []\n", OutOfRangeError, "recipes"),
        ("name: s\nrecipes: [ful.yaml]\n", MissingFileError, "did you mean 'full.yaml'"),
        ("name: s\nrecipes: [full.yaml]\naxes: {train.sed: [1]}\n", UnknownKeyError, "did you mean 'train.seed'"),
        ("name: s\nrecipes: full.yaml\n", WrongTypeError, "recipes"),
    ],
)
def test_invalid_suites_are_refused(folder: Path, text: str, error: type[RecipeError], message: str) -> None:
    """The message names the nearest valid key or file."""
    with pytest.raises(error, match=message):
        expand(write_suite(folder, text))


def test_accelerate_config_is_relative_to_the_suite(folder: Path) -> None:
    """Without one the result is None; a file that does not exist is refused."""
    (folder / "cpu.yaml").write_text("use_cpu: true\n")
    assert resolve_accelerate_config(write_suite(folder, "name: s\nrecipes: [full.yaml]\n")) is None
    assert (
        resolve_accelerate_config(write_suite(folder, "name: s\nrecipes: [full.yaml]\naccelerate: cpu.yaml\n"))
        == folder / "cpu.yaml"
    )
    with pytest.raises(MissingFileError, match=r"gpu\.yaml"):
        resolve_accelerate_config(write_suite(folder, "name: s\nrecipes: [full.yaml]\naccelerate: gpu.yaml\n"))


STOPPING = "overrides: [evaluate.interval=1, early_stopping.patience=2{more}]\n"


def test_unequal_steps_are_refused(folder: Path) -> None:
    """Early stopping could end the runs of a comparison at different steps; one training cannot differ from others."""
    text = "name: s\nrecipes: [{recipes}]\n" + STOPPING
    with pytest.raises(OutOfRangeError, match=r"early_stopping\.patience=2 of full .* 2 trainings") as raised:
        expand(write_suite(folder, text.format(recipes="full.yaml, lora.yaml", more="")))
    assert "early_stopping.allow_unequal_steps=true" in str(raised.value)
    with pytest.raises(OutOfRangeError, match="different numbers of steps"):
        expand(write_suite(folder, text.format(recipes="lora.yaml", more="")), seeds=2)
    allowed = text.format(recipes="full.yaml, lora.yaml", more=", early_stopping.allow_unequal_steps=true")
    assert len(expand(write_suite(folder, allowed))) == 2
    (folder / "zero.yaml").write_text("extends: common.yaml\nname: zero\nmethod: {kind: zero_shot}\n")
    assert len(expand(write_suite(folder, text.format(recipes="lora.yaml, zero.yaml", more="")))) == 2
