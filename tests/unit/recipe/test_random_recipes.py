"""Random recipes at ``train --print-config``: valid YAML or one sentence, whatever the keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.methods import METHOD_KINDS
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Recipe

EXIT_CODES = {0, 10, 11, 12, 13, 14, 80}
"""Codes of recipes in docs/reference/errors.md, and 80 for a size."""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "off", "010", "1:30", "null", "~", "1e3", "16GiB", "${train.steps}", "${oops", "🙂", ""]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def keys_of(section: Any) -> st.SearchStrategy[str]:
    """Draw a key of a section, or any text."""
    return st.sampled_from(sorted(section.model_fields)) | st.text(max_size=6)


def section(kind: Any) -> st.SearchStrategy[Any]:
    """Draw a section with some of its keys, or any value."""
    return st.dictionaries(keys_of(kind), VALUES, max_size=4) | VALUES


def section_of_kinds(kinds: Any) -> st.SearchStrategy[Any]:
    """Draw a section that is selected by its kind."""
    drawn = st.sampled_from(sorted(kinds)).flatmap(
        lambda name: st.dictionaries(keys_of(kinds[name]), VALUES, max_size=3).map(lambda keys: {**keys, "kind": name})
    )
    return drawn | VALUES


PLAIN_SECTIONS = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields") and name != "method"
}
RECIPES = st.fixed_dictionaries(
    {
        "name": st.just("run") | VALUES,
        "method": section_of_kinds(METHOD_KINDS),
        "train": st.just({"steps": 3}) | section(PLAIN_SECTIONS.pop("train")),
    },
    optional={
        **{name: section(kind) for name, kind in PLAIN_SECTIONS.items()},
        "optimizer": section_of_kinds(OPTIMIZERS),
        "extends": st.text(max_size=5),
        "trackers": VALUES,
        "save_model": VALUES,
        "output_dir": VALUES,
        "recipes": VALUES,
        "slurm": VALUES,
    },
)
OVERRIDES = st.lists(
    st.builds(
        lambda group, key, value: f"{group}.{key}={value}",
        st.sampled_from(sorted(Recipe.model_fields)),
        st.text(max_size=6),
        st.text(max_size=8),
    )
    | st.text(max_size=10),
    max_size=2,
)


def print_config(path: Path, overrides: list[str]) -> None:
    """Check the exit code, the one sentence or the recipe that can be read again."""
    arguments = [override for override in overrides if not override.startswith("-")]
    result = CliRunner().invoke(app, ["train", str(path), *arguments, "--print-config"], prog_name="peftbench")
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    assert result.exit_code in EXIT_CODES, result.output
    if result.exit_code == 0:
        assert isinstance(yaml.safe_load(result.stdout), dict)
        return
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for term in ("Traceback", "pydantic", "OmegaConf", "Input should"):
        assert term not in result.stderr


def check_random_recipe(folder: Path) -> Callable[[dict[str, Any], list[str]], None]:
    """Return a function that writes a recipe and checks what the command prints."""

    def check(recipe: dict[str, Any], overrides: list[str]) -> None:
        path = folder / "random.yaml"
        recipe.setdefault("data", {"source": {"kind": "docstrings"}})
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        print_config(path, overrides)

    return check


@pytest.mark.parametrize(
    "count",
    [pytest.param(20, id="20"), pytest.param(500, id="500", marks=pytest.mark.slow)],
)
def test_random_recipe_is_printed_or_refused_in_one_sentence(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty recipes in the fast tier, five hundred in the slow one, and those that once failed."""
    monkeypatch.chdir(tmp_path)
    check = check_random_recipe(tmp_path)

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(recipe=RECIPES, overrides=OVERRIDES)
    @example(recipe={"name": "run", "method": {"kind": "full"}, "recipes": [1]}, overrides=[])
    @example(recipe={"name": "run", "method": {"kind": "full"}, "recipes": {"a": 1}}, overrides=[])
    @example(recipe={"name": "n" * 300, "method": {"kind": "full"}, "train": {"steps": 3}}, overrides=[])
    @example(recipe={"name": "run", "method": {"kind": "full"}, "train": {"steps": 3}}, overrides=["train.steps=-010"])
    def run(recipe: dict[str, Any], overrides: list[str]) -> None:
        check(recipe, overrides)

    run()
