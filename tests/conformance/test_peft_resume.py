"""Every type of peft resumes: a stopped run has the losses and the adapter of an uninterrupted one, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest

from peftbench.recipe.schema import Checkpoint
from tests.helpers.peft_types import ALL_TYPES, build_method
from tests.helpers.stopped_runs import run_until_first_checkpoint
from tests.helpers.workshop import Workshop

FAST = {"IA3", "OSF", "PREFIX_TUNING", "PVERA"}
"""Types that scale activations, replace layers, train keys and values, and draw random numbers in the forward pass."""
POINTS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALL_TYPES]


@pytest.mark.parametrize("name", POINTS)
def test_stopped_run_resumes_to_the_last_bit(name: str, workshop: Workshop) -> None:
    """Dropout and accumulation are on; the saved adapters have the same bytes."""
    method = build_method(name)
    settings: dict[str, Any] = {
        "train": {"steps": 4, "micro_batch_size": 4},
        "model": {"dropout": 0.2},
        "save_model": True,
    }
    uninterrupted = workshop.run(workshop.recipe(method, name="uninterrupted", **settings))
    recipe = workshop.recipe(method, name="stopped", checkpoint=Checkpoint(interval=2), **settings)
    run_until_first_checkpoint(workshop, recipe)
    resumed = workshop.run(recipe)
    assert resumed.resumed_after == (2,)
    assert resumed.step_losses == uninterrupted.step_losses
    assert len(set(resumed.step_losses)) == len(resumed.step_losses)
    files = [
        {file.name: file.read_bytes() for file in (workshop.output / folder / "model").glob("*.safetensors")}
        for folder in ("uninterrupted", "stopped")
    ]
    assert files[0]
    assert files[0] == files[1]
