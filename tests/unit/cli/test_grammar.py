"""The command line's grammar: recipe or suite, ``--config``, overrides; usage errors are one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from peftbench.cli.app import app
from peftbench.recipe.schema import Recipe
from tests.helpers.project import RECIPE, write_project

Invoke = Callable[..., Result]
RECIPE_COMMANDS = {
    "train": ("train", "--print-config"),
    "show": ("show",),
    "estimate": ("estimate", "--json"),
    "fit": ("fit", "--budget", "4GiB", "--techniques", "checkpointing", "--json"),
}
SUITE_COMMANDS = {"run": ("run", "--dry-run"), "submit": ("submit", "--dry-run")}


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Return a function that runs peftbench in a folder with a recipe, a suite and a file to merge."""
    monkeypatch.chdir(write_project(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "home"))  # without SLURM's commands
    (tmp_path / "home").mkdir()
    Path("home/recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    Path("suite.yaml").write_text("name: both\nrecipes: [recipe.yaml]\n", encoding="utf-8")
    Path("more.yaml").write_text("train: {steps: 3}\n", encoding="utf-8")
    return lambda *arguments: CliRunner().invoke(app, list(arguments), prog_name="peftbench")


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_recipe_command_merges_file_config_and_overrides(command: str, invoke: Invoke) -> None:
    """The recipe comes first, then files of --config, then overrides; ``~`` is expanded."""
    name, *options = RECIPE_COMMANDS[command]
    result = invoke(name, "~/recipe.yaml", "name=changed", "--config", "more.yaml", *options)
    assert result.exit_code == 0, result.output
    if command in {"train", "show"}:
        assert "name: changed" in result.stdout
        assert "steps: 3 " in result.stdout


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_recipe_command_takes_the_recipe_with_config_too(command: str, invoke: Invoke) -> None:
    """--config without a positional file is the older spelling; it works as before."""
    name, *options = RECIPE_COMMANDS[command]
    assert invoke(name, "--config", "recipe.yaml", "train.steps=2", *options).exit_code == 0


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("train", "use peftbench run suite.yaml"),
        ("show", "give one of its recipes: recipe.yaml"),
        ("estimate", "use peftbench estimate --suite suite.yaml"),
        ("fit", "give one of its recipes: recipe.yaml"),
    ],
)
def test_suite_in_place_of_a_recipe_is_refused(command: str, hint: str, invoke: Invoke) -> None:
    """The sentence states which it is, and what to do."""
    result = invoke(command, "suite.yaml")
    assert result.exit_code == 10
    assert result.stderr == f"error: suite.yaml is a suite, and peftbench {command} takes a recipe; {hint}\n"


def test_recipe_in_place_of_a_suite_is_refused(invoke: Invoke) -> None:
    """The sentence states which it is, and what to do."""
    result = invoke("run", "recipe.yaml")
    assert result.exit_code == 10
    assert result.stderr == (
        "error: recipe.yaml is a recipe, and peftbench run takes a suite; use peftbench train recipe.yaml\n"
    )


@pytest.mark.parametrize("command", [*RECIPE_COMMANDS, *SUITE_COMMANDS])
def test_missing_file_is_refused(command: str, invoke: Invoke) -> None:
    """The nearest file of the folder is suggested."""
    result = invoke(command, "recipes.yaml")
    assert result.exit_code == 14
    assert "file 'recipes.yaml' does not exist; did you mean 'recipe.yaml'?" in result.stderr


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_second_recipe_file_is_refused(command: str, invoke: Invoke) -> None:
    """Files are merged with --config."""
    result = invoke(command, "recipe.yaml", "more.yaml")
    assert result.exit_code == 10
    assert "takes one recipe file, and more.yaml is a second one; merge files with --config" in result.stderr


@pytest.mark.parametrize("command", SUITE_COMMANDS)
def test_suite_command_merges_config_into_every_recipe(command: str, invoke: Invoke) -> None:
    """Overrides win over files of --config."""
    name, *options = SUITE_COMMANDS[command]
    result = invoke(name, "suite.yaml", "--config", "more.yaml", "name=changed", "--out", "new", *options)
    assert result.exit_code == 0, result.output
    assert "changed" in result.stdout or Path("new/changed/recipe.yaml").is_file()
    if command == "submit":
        assert "steps: 3 " in Path("new/changed/recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("trian", "there is no command 'trian'; did you mean 'train'? (allowed: run, train, "),
        ("run suite.yaml --sed 3", "peftbench run has no option --sed; did you mean '--seeds'?"),
        ("run suite.yaml --seeds 0", "--seeds=0 is not an allowed value; it must be at least 1"),
        ("run suite.yaml --seeds many", "--seeds=many is not an allowed value; it must be an integer"),
        ("report runs --price-per-hour cheap", "--price-per-hour=cheap is not an allowed value; it must be a number"),
        ("report", "peftbench report needs FOLDER; give it, or see peftbench report --help"),
        ("compare before", "peftbench compare needs AFTER"),
        ("report a b", "peftbench report takes no argument 'b'"),
        ("estimate recipe.yaml --budget", "option --budget needs a value; see --help"),
        ("fit recipe.yaml --verify=3", "option --verify takes no value; see --help"),
    ],
)
def test_usage_error_is_one_sentence(arguments: str, sentence: str, invoke: Invoke) -> None:
    """The exit code is 2, and no message of the command-line library is printed."""
    result = invoke(*arguments.split())
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {sentence}")
    assert result.stderr.count("\n") == 1


LONG = "n" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        f"train {LONG}.yaml --print-config",
        f"train recipe.yaml --config {LONG}.yaml --print-config",
        f"estimate recipe.yaml --accelerate {LONG}",
        f"estimate recipe.yaml model.path=./{LONG}",
        f"fit recipe.yaml --budget 1GiB --accelerate {LONG}",
        f"run {LONG}.yaml",
        f"run suite.yaml --accelerate {LONG}",
        f"submit suite.yaml --accelerate {LONG} --dry-run",
        f"show --diff recipe.yaml {LONG}",
        f"status {LONG}",
        f"report {LONG}",
        f"compare {LONG} {LONG}",
    ],
)
def test_path_longer_than_the_file_system_allows_is_one_sentence(arguments: str, invoke: Invoke) -> None:
    """No command prints a traceback."""
    result = invoke(*arguments.split())
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code not in {0, 1}
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("content", ["[zero2]", "compute_environment: [", "text"])
@pytest.mark.parametrize("command", ["run suite.yaml --dry-run", "submit suite.yaml --dry-run"])
def test_invalid_accelerate_config_is_refused(command: str, content: str, invoke: Invoke) -> None:
    """It is refused before any run, with its path."""
    Path("bad.yaml").write_text(content, encoding="utf-8")
    result = invoke(*command.split(), "--accelerate", "bad.yaml")
    assert (result.exit_code, result.stdout) == (40, "")
    assert result.stderr.startswith("error: bad.yaml ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("recipes", ["[1]", "recipe.yaml", "{a: b}"])
def test_suite_with_invalid_recipes_is_refused(recipes: str, invoke: Invoke) -> None:
    """In place of a recipe the sentence states what a suite needs; as a suite its type is refused."""
    Path("broken.yaml").write_text(f"name: broken\nrecipes: {recipes}\n", encoding="utf-8")
    shown, run = invoke("show", "broken.yaml"), invoke("run", "broken.yaml", "--dry-run")
    assert shown.exit_code == 10
    assert shown.stderr == (
        "error: broken.yaml is a suite, and peftbench show takes a recipe; recipes must be a list of recipe files\n"
    )
    assert run.exit_code == (14 if recipes == "[1]" else 12), run.stderr


def test_untimed_run_is_noted_before_it_starts(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """If train.steps is set, the note comes before anything is loaded."""

    def stop(recipe: Recipe) -> None:
        raise typer.Exit(3)

    monkeypatch.setattr("peftbench.train.run_recipe", stop)
    result = invoke("train", "recipe.yaml", "train.steps=2", "profile.untimed_steps=2")
    assert result.exit_code == 3
    assert result.stderr.startswith("note: profile.untimed_steps=2 leaves none of the 2 steps timed")


def test_version(invoke: Invoke) -> None:
    """It is that of the installed package."""
    from importlib.metadata import version

    assert invoke("--version").stdout == f"peftbench {version('peftbench')}\n"
