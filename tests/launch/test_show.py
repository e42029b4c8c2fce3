"""``peftbench show``."""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.report.tables.columns import COLUMNS
from tests.launch.conftest import RECIPE


def test_the_glossary_defines_every_column() -> None:
    """Each column's title is followed by its meaning, on a line."""
    shown = CliRunner().invoke(app, ["show", "--glossary"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines() == [f"{column.title}: {column.description}" for column in COLUMNS]


def test_a_file_is_a_file_whatever_its_name(tmp_path: Path) -> None:
    """A suite's folders have a "=" in their names; what is there as a file is no override."""
    path = tmp_path / "lora-seed=0" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    shown = CliRunner().invoke(app, ["show", str(path), "train.steps=7"])
    assert shown.exit_code == 0, shown.output
    assert "steps: 7" in shown.output
    assert "# Optimizer steps; give this or epochs." in shown.output
