"""Makes recipes over small models and a small corpus, and runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.data.sources import Files
from peftbench.methods.base import Method
from peftbench.recipe.schema import Data, Evaluate, Model, Profile, Recipe, Train
from tests.helpers.training import forget_accelerators

if TYPE_CHECKING:
    from peftbench.record import RunRecord


@dataclass(frozen=True)
class Workshop:
    """Makes recipes over the small bases and the small corpus, and runs them."""

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
        """A short run of ``method``; what is given replaces single knobs, or whole parts by name."""
        knobs_of_model = {"path": str(self.base_folder(architecture))} | (model or {})
        knobs_of_data = {"source": self.source, "max_length": 48, "separator": " TL;DR:"} | (data or {})
        knobs_of_train = {"steps": 3, "global_batch_size": 6} | (train or {})
        knobs_of_evaluate = {"generate": False, "max_new_tokens": 8, "bootstrap_resamples": 100} | (evaluate or {})
        values: dict[str, Any] = {
            "name": "run",
            "output_dir": str(self.output),
            "save_model": False,
            "method": method,
            "model": Model(**knobs_of_model),
            "data": Data(**knobs_of_data),
            "train": Train(**knobs_of_train),
            "evaluate": Evaluate(**knobs_of_evaluate),
            "profile": Profile(untimed_steps=0),
        }
        return Recipe(**values | parts)

    def run(self, recipe: Recipe) -> RunRecord:
        """The record of a run of ``recipe``, as in a process of its own."""
        from peftbench.run.runner import Run

        forget_accelerators()
        record, _ = Run(recipe).execute()
        return record
