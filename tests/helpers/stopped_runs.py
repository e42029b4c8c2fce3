"""Runs that are stopped between two steps."""

from __future__ import annotations

import pytest

from peftbench.recipe.schema import Recipe
from peftbench.training.checkpoint import CheckpointManager
from tests.helpers.workshop import Workshop


class StoppedError(Exception):
    """Stops a run between two steps, like a kill."""


def run_until_first_checkpoint(workshop: Workshop, recipe: Recipe) -> None:
    """Run ``recipe`` until its first checkpoint is written."""
    save = CheckpointManager.save

    def save_and_stop(self: CheckpointManager, step: int, state: dict[str, object]) -> None:
        save(self, step, state)
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointManager, "save", save_and_stop)
        with pytest.raises(StoppedError):
            workshop.run(recipe)
