"""Recipe files in YAML, and the keys that each recipe must set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
