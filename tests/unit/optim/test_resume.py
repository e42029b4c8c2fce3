"""A run that is stopped and resumed has the weights of an uninterrupted one, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest

from peftbench.optim import Lisa, LoraFA, LoraPlus, Muon, Optimizer, ScheduleFree
from peftbench.recipe.schema import Checkpoint
from tests.helpers.methods import method_for
from tests.helpers.stopped_runs import run_until_first_checkpoint
from tests.helpers.workshop import Workshop


@pytest.mark.parametrize(
    "optimizer",
    [
        Muon(learning_rate=1e-3),
        ScheduleFree(learning_rate=1e-2),
        Lisa(learning_rate=1e-3, num_blocks=1, interval=2),
        LoraPlus(learning_rate=1e-3),
        LoraFA(learning_rate=1e-2),
    ],
    ids=lambda optimizer: optimizer.kind,
)
def test_resumed_run_is_bit_identical(optimizer: Optimizer, workshop: Workshop) -> None:
    """The losses of all steps and of the evaluation are equal; dropout and accumulation are on."""
    settings: dict[str, Any] = {
        "train": {"steps": 6, "micro_batch_size": 4},
        "model": {"dropout": 0.2},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "optimizer": optimizer,
        "save_model": True,
    }
    uninterrupted = workshop.run(workshop.recipe(method_for(optimizer), name="uninterrupted", **settings))
    recipe = workshop.recipe(method_for(optimizer), name="stopped", checkpoint=Checkpoint(interval=3), **settings)
    run_until_first_checkpoint(workshop, recipe)
    resumed = workshop.run(recipe)
    assert resumed.resumed_after == (3,)
    assert resumed.step_losses == uninterrupted.step_losses
    assert resumed.quality == uninterrupted.quality
    files = [next((workshop.output / name / "model").glob("*.safetensors")) for name in ("uninterrupted", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
