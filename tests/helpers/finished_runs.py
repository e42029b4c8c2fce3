"""Finished runs over small base models, for tests of what is done with a trained model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from peftbench.recipe.schema import Recipe
from tests.helpers.corpus import examples
from tests.helpers.short_runs import freeze_imported_objects, use_small_matmul
from tests.helpers.training import reset_accelerators

if TYPE_CHECKING:
    from peftbench.record import RunRecord

ROWS = [{"prompt": example["article"], "completion": example["summary"]} for example in examples(12, seed=4)]


def write_rows(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write rows (by default prompts with completions) as JSON lines and return the file."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS), encoding="utf-8")
    return file


def build_recipe(base: Path | str, rows: Path, output: Path, method: dict[str, Any], **sections: Any) -> Recipe:
    """Return the recipe of a short run; ``sections`` replace keys of the recipe, a dict merges into a section."""
    values: dict[str, Any] = {
        "name": str(method["kind"]),
        "output_dir": str(output),
        "model": {"path": str(base), "attention": "sdpa"},
        "method": method,
        "data": {"source": {"kind": "files", "train": str(rows), "test": str(rows)}, "max_length": 48},
        "task": {"kind": "completion"},
        "optimizer": {"kind": "adamw", "learning_rate": 0.01},
        "train": {"steps": 3, "global_batch_size": 6, "precision": "fp32"},
        "evaluate": {"max_new_tokens": 4, "bootstrap_resamples": 100},
        "profile": {"untimed_steps": 0},
    }
    for key, value in sections.items():
        values[key] = values[key] | value if isinstance(value, dict) and key in values else value
    return Recipe.model_validate(values)


def train_run(recipe: Recipe) -> RunRecord:
    """Run ``recipe`` on the CPU and return its record."""
    from peftbench.run.runner import Run

    with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        reset_accelerators()
        with use_small_matmul():
            record, _ = Run(recipe).execute()
        reset_accelerators()
    freeze_imported_objects()
    return record
