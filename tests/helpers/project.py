"""A working directory with a recipe and its examples, and the launch script that trains it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.helpers.paths import REPOSITORY

LAUNCH = REPOSITORY / "launch" / "train.py"
ROWS = [
    {  # with different lengths: equal ones would hide a mean of means
        "article": f"The council met on day {number}. It voted on the bridge. " * (2 + number % 5),
        "summary": f"The council votes on day {number} on a bridge." + " And on a road." * (number % 3),
    }
    for number in range(8)
]
RECIPE = {
    "name": "run",
    "output_dir": "out",
    "model": {"path": "shipped"},
    "method": {"kind": "lora"},
    "data": {"source": {"kind": "files", "train": "rows.jsonl", "test": "rows.jsonl"}, "max_length": 128},
    "train": {"steps": 1, "global_batch_size": 4, "precision": "fp32"},
    "evaluate": {"metrics": (), "max_new_tokens": 8, "bootstrap_resamples": 100},
    "profile": {"untimed_steps": 0},
}


def write_project(folder: Path) -> Path:
    """Write a valid recipe and its examples to ``folder`` and return it."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder
