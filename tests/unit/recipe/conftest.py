"""Fixtures for tests of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.recipe_files import REQUIRED_KEYS, write


@pytest.fixture
def least(tmp_path: Path) -> Path:
    """Write a file with only the required keys of a recipe, and return its path."""
    return write(tmp_path / "least.yaml", REQUIRED_KEYS)
