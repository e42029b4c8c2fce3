"""The command ``peftbench show``."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.errors import OutputError
from peftbench.report.analysis.quality_metrics import QualityMetric
from peftbench.report.tables.columns import list_columns
from peftbench.slurm import folder
from tests.helpers.project import RECIPE
from tests.helpers.scores import DEFINITIONS


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a recipe to a folder with "=" in its name, like the run folders of a suite with axes."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lora-seed=0" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return path


def test_show_glossary_prints_every_column() -> None:
    """Check that each line has a column's title and description."""
    result = CliRunner().invoke(app, ["show", "--glossary"])
    assert result.exit_code == 0, result.output
    columns = list_columns([QualityMetric(name, definition) for name, definition in DEFINITIONS.items()])
    assert result.output.splitlines() == [f"{column.title}: {column.description}" for column in columns]
    assert "ROUGE-L" in {column.title for column in columns}


def test_existing_file_is_not_an_override(recipe_file: Path) -> None:
    """Check that an existing path with "=" is read as a recipe file."""
    result = CliRunner().invoke(app, ["show", str(recipe_file), "train.steps=7"])
    assert result.exit_code == 0, result.output
    assert "steps: 7" in result.output


def test_run_dir_is_created_and_printed(recipe_file: Path) -> None:
    """Check ``show --run-dir``, its alias for job scripts, and the error if the folder cannot be created."""
    result = CliRunner().invoke(app, ["show", "--run-dir", str(recipe_file), "name=first"])
    assert (result.exit_code, result.output) == (0, "out/first\n")
    assert Path("out/first").is_dir()
    result = CliRunner().invoke(folder.app, ["--config", str(recipe_file), "name=second"])
    assert (result.exit_code, result.output) == (0, "out/second\n")
    assert Path("out/second").is_dir()
    result = CliRunner().invoke(app, ["show", "--run-dir", str(recipe_file), f"output_dir={recipe_file}"])
    assert result.exit_code == OutputError.exit_code


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["--glossary", "name=x"], "--glossary takes no argument"),
        (["--diff", "RECIPE", "RECIPE", "name=x"], "--diff takes two files"),
        (["--diff", "RECIPE", "RECIPE", "--config", "name=x"], "--diff takes two files"),
    ],
)
def test_show_refuses_arguments_that_it_would_ignore(arguments: list[str], usage: str, recipe_file: Path) -> None:
    """--glossary and --diff use no overrides."""
    result = CliRunner().invoke(app, ["show", *(str(recipe_file) if text == "RECIPE" else text for text in arguments)])
    assert (result.exit_code, result.stderr) == (
        10,
        f"error: peftbench show {usage}, and name=x was given too; remove it\n",
    )
