"""Accelerate configs set devices and processes, but no key of a recipe."""

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
    """Return every key of a nested mapping."""
    if not isinstance(value, dict):
        return set()
    return set(value) | {key for child in value.values() for key in keys(child)}


def test_accelerate_configs_are_found() -> None:
    """The other test of this file needs a complete list."""
    assert {path.stem for path in FILES} >= {"cpu", "cpu2", "single_gpu", "ddp"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_config_sets_no_recipe_key(path: Path) -> None:
    """No accelerate config has a recipe's setting at any depth."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content
    assert not keys(content) & OWNED_BY_RECIPES
