"""A factory of recipes over small models and a small corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.data.sources import Files
from peftbench.methods.base import Method
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Data, Evaluate, Model, Profile, Recipe, Schedule, Train
from peftbench.tasks.summarization import Summarization
from tests.helpers.short_runs import freeze_imported_objects, use_small_matmul
from tests.helpers.training import reset_accelerators

if TYPE_CHECKING:
    from peftbench.record import RunRecord


@dataclass(frozen=True)
class Workshop:
    """Creates recipes over the small base models and the small corpus, and runs them."""

    base_folder: Callable[[str], Path]
    source: Files
    output: Path

    def recipe(
        self,
        method: Method,
        *,
        architecture: str = "gpt2_tied",
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        evaluate: dict[str, Any] | None = None,
        **parts: Any,
    ) -> Recipe:
        """Return the recipe of a short run. Dicts replace keys of a section, ``parts`` replace whole sections.

        The schedule is constant if the optimizer requires that.
        """
        model_keys = {"path": str(self.base_folder(architecture)), "attention": "sdpa"} | (model or {})
        data_keys = {"source": self.source, "max_length": 48} | (data or {})
        train_keys = {"steps": 3, "global_batch_size": 6, "precision": "fp32"} | (train or {})
        evaluate_keys = {"metrics": (), "max_new_tokens": 8, "bootstrap_resamples": 100} | (evaluate or {})
        values: dict[str, Any] = {
            "name": "run",
            "output_dir": str(self.output),
            "save_model": False,
            "method": method,
            "model": Model(**model_keys),
            "data": Data(**data_keys),
            "task": Summarization(separator=" TL;DR:"),
            "train": Train(**train_keys),
            "evaluate": Evaluate(**evaluate_keys),
            "profile": Profile(untimed_steps=0),
        }
        optimizer = parts.get("optimizer", {})
        kind = optimizer.get("kind", "adamw") if isinstance(optimizer, dict) else optimizer.kind
        if OPTIMIZERS[kind].averages_weights:
            values["schedule"] = Schedule(kind="constant")
        return Recipe(**values | parts)

    def run(self, recipe: Recipe) -> RunRecord:
        """Run ``recipe`` with a new accelerator and return its record."""
        from peftbench.run.runner import Run

        reset_accelerators()
        with use_small_matmul():
            record, _ = Run(recipe).execute()
        freeze_imported_objects()
        return record
