"""Accelerate configs set where a run happens and no key of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "accel_configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
OWNED_BY_RECIPES = {
    "mixed_precision",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "downcast_bf16",
    "fp8_config",
    "fsdp_activation_checkpointing",
    "dynamo_config",
    "parallelism_config",
}


def keys(value: object) -> set[str]:
    """Every key of a tree."""
    if not isinstance(value, dict):
        return set()
    return set(value) | {key for below in value.values() for key in keys(below)}


def test_the_files_are_found() -> None:
    """The search finds the shipped files."""
    assert {path.stem for path in FILES} >= {"cpu", "cpu2", "single_gpu", "ddp"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_that_changes_numbers(path: Path) -> None:
    """No accelerate file sets what belongs to a recipe, at any depth."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content
    assert not keys(content) & OWNED_BY_RECIPES
