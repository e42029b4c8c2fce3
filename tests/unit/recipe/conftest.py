"""Fixtures for tests of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

REQUIRED_KEYS: dict[str, Any] = {
    "name": "run",
    "method": {"kind": "lora"},
    "data": {"source": {"kind": "docstrings"}},
    "train": {"steps": 10},
}


def write(path: Path, values: dict[str, Any] | str) -> Path:
    """Write ``values`` as YAML, or text unchanged, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def least(tmp_path: Path) -> Path:
    """Write a file with only the required keys of a recipe, and return its path."""
    return write(tmp_path / "least.yaml", REQUIRED_KEYS)
