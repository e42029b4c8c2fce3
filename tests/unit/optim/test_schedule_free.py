"""Schedule-Free evaluates and saves the average of the weights, and trains at an interpolation with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.optim import ScheduleFree
from peftbench.recipe.schema import Checkpoint, Schedule
from tests.helpers.stopped_runs import run_until_first_checkpoint
from tests.helpers.workshop import Workshop

RATE, BETA = 1e-2, 0.9
OPTIMIZER = ScheduleFree(learning_rate=RATE)


def test_steps_match_the_paper() -> None:
    """In three steps z moves by Adam's rule without momentum, x is the mean of all z, gradients are taken at y."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    kind = ScheduleFree(learning_rate=RATE, betas=(BETA, 0.99), eps=1e-8)
    optimizer = kind.build([parameter])
    x = z = parameter.detach().clone()
    second = torch.zeros_like(z)
    for step in range(1, 4):
        y = (1 - BETA) * z + BETA * x
        assert torch.allclose(parameter.detach(), y, rtol=1e-12)
        gradient = torch.sin(y)  # any function of the weights
        parameter.grad = torch.sin(parameter.detach())
        optimizer.step()
        second = 0.99 * second + 0.01 * gradient**2
        z = z - RATE * gradient / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        x = x + (z - x) / step
    kind.set_evaluation(optimizer)
    assert torch.allclose(parameter.detach(), x, rtol=1e-12)


def test_trained_weights_return_to_the_last_bit() -> None:
    """Computing one kind of weights from the other would round."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(1000))
    optimizer = OPTIMIZER.build([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(1000)
        optimizer.step()
    trained = parameter.detach().clone()
    with OPTIMIZER.evaluation_weights(optimizer):
        assert not torch.equal(parameter, trained)
    assert torch.equal(parameter, trained)
    parameter.grad = torch.ones(1000)
    optimizer.step()


def test_evaluation_during_training_changes_nothing(workshop: Workshop) -> None:
    """Losses and saved weights are those of a run without it; the last evaluation is of the saved weights."""
    settings: dict[str, Any] = {"optimizer": OPTIMIZER, "save_model": True}
    for name, evaluate in (("plain", {}), ("evaluated", {"interval": 1, "split": "validation"})):
        record = workshop.run(workshop.recipe(Lora(r=2), name=name, evaluate=evaluate, **settings))
        assert record.outcome.kind == "ok"
    weights = [
        load_file(workshop.output / name / "model" / "adapter_model.safetensors") for name in ("plain", "evaluated")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "training losses are those of the interpolated weights; the average is evaluated and saved" in record.notes
    assert record.held_out_curve is not None
    assert record.quality is not None
    assert record.held_out_curve.points[-1].loss == pytest.approx(record.quality.loss, rel=1e-6)


def test_checkpoint_after_an_evaluation_resumes_to_the_last_bit(workshop: Workshop) -> None:
    """Every checkpoint, also that of the last step, has the trained weights and not the evaluated ones."""
    settings: dict[str, Any] = {
        "train": {"steps": 4},
        "evaluate": {"interval": 1, "split": "validation"},
        "optimizer": OPTIMIZER,
    }
    whole = workshop.run(workshop.recipe(Full(), name="whole", **settings))
    for interval in (2, 4):
        recipe = workshop.recipe(Full(), name=str(interval), checkpoint=Checkpoint(interval=interval), **settings)
        run_until_first_checkpoint(workshop, recipe)
        resumed = workshop.run(recipe)
        assert resumed.resumed_after == (interval,)
        assert (resumed.step_losses, resumed.quality) == (whole.step_losses, whole.quality)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decaying_schedule_is_refused(kind: str, workshop: Workshop) -> None:
    """The refusal names the schedule to set."""
    with pytest.raises(ValueError, match=f"schedule.kind={kind} decays the learning rate; set schedule.kind=constant"):
        workshop.recipe(Full(), optimizer=OPTIMIZER, schedule=Schedule.model_validate({"kind": kind}))


def test_zero_weight_of_the_average_is_refused() -> None:
    """The library divides by it."""
    with pytest.raises(ValueError, match="greater than 0"):
        ScheduleFree(betas=(0.0, 0.999))
