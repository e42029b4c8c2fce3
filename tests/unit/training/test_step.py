"""One optimizer step: clipping, the schedule's place in it, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peftbench.distributed.accelerator import build_accelerator
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.optim import SGD, AdamW
from peftbench.profiler.probe import Probe
from peftbench.recipe.schema import Schedule
from peftbench.training.build import TrainingComponents
from peftbench.training.loop import TrainProgress, train, train_step
from tests.helpers.batches import micro_batch, one_batch
from tests.helpers.callbacks import StepRecorder
from tests.helpers.training import trained, trainer_from, trainer_of
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


def _moved(accelerator: Accelerator, model: PreTrainedModel, max_grad_norm: float | None) -> float:
    """Norm of what plain gradient descent at rate 1 moves, which is the norm of the gradient it was given."""
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    trainer = trainer_of(accelerator, model, torch.optim.SGD(trained(model).values(), lr=1.0))
    train_step(accelerator, trainer, one_batch(micro_batch()), max_grad_norm)
    squares = [((parameter - before[name]).double() ** 2).sum() for name, parameter in trained(model).items()]
    return math.sqrt(sum(square.item() for square in squares))


def test_clipping_bounds_the_gradient(fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator) -> None:
    """A gradient longer than the bound is cut to it, a shorter one and one without a bound are left alone."""
    whole = _moved(accelerator, fresh_base("gpt2_tied"), None)
    assert whole > 0.5
    assert _moved(accelerator, fresh_base("gpt2_tied"), 0.25) == pytest.approx(0.25, rel=1e-3)
    assert _moved(accelerator, fresh_base("gpt2_tied"), 2 * whole) == pytest.approx(whole, rel=1e-3)


def test_step_returns_the_loss_before_it(
    fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator
) -> None:
    """The loss of a step is that of the weights it started from; no gradient is left for the next one."""
    model = fresh_base("gpt2_tied")
    trainer = trainer_of(accelerator, model, torch.optim.SGD(trained(model).values(), lr=0.1))
    first, second = (train_step(accelerator, trainer, one_batch(micro_batch()), None) for _ in range(2))
    other = fresh_base("gpt2_tied")
    still = trainer_of(accelerator, other, torch.optim.SGD(trained(other).values(), lr=0.0))
    assert train_step(accelerator, still, one_batch(micro_batch()), None) == first
    assert second < first
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def _trainer(workshop: Workshop, **parts: Any) -> tuple[Accelerator, TrainingComponents]:
    recipe = workshop.recipe(Lora(r=2), train={"steps": 10}, **parts)
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    return accelerator, trainer_from(recipe, accelerator)


def _rate_by_hand(kind: str, warmup: int, steps: int, step: int) -> float:
    """Share of the peak rate at ``step``, counted from 0."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules(kind: str, warmup: int, workshop: Workshop) -> None:
    """At every step the optimizer has the rate of the schedule's formula, warm-up first, and trackers are told it."""
    accelerator, trainer = _trainer(
        workshop,
        schedule=Schedule.model_validate({"kind": kind, "warmup_steps": warmup}),
        optimizer=AdamW(learning_rate=2e-3),
    )
    used: list[float] = []
    recorder = StepRecorder()
    bare = trainer.optimizer.optimizer  # type: ignore[attr-defined]
    bare.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    train(
        accelerator,
        trainer,
        Probe(accelerator.device),
        TrainProgress(),
        max_grad_norm=None,
        callbacks=[recorder],
    )
    assert used == pytest.approx([2e-3 * _rate_by_hand(kind, warmup, 10, index) for index in range(10)])
    assert [info.learning_rate for info in recorder.infos] == used


def test_optimizer_gets_the_recipe_s_knobs_and_trained_parameters_alone(workshop: Workshop) -> None:
    """The optimizer that steps is the recipe's, with its knobs, over what requires a gradient."""
    _, trainer = _trainer(workshop, optimizer=SGD(learning_rate=0.5, momentum=0.9, weight_decay=0.01))
    bare = trainer.optimizer.optimizer  # type: ignore[attr-defined]
    assert type(bare) is torch.optim.SGD
    (group,) = bare.param_groups
    assert (group["momentum"], group["weight_decay"], group["initial_lr"]) == (0.9, 0.01, 0.5)
    assert {id(p) for p in group["params"]} == {id(p) for p in trained(trainer.model).values()}
    assert group["params"]


def test_train_tells_every_step_and_counts_every_token(workshop: Workshop) -> None:
    """Each finished step is told once, in order, and the counts are those of all batches together."""
    accelerator, trainer = _trainer(workshop)
    progress, recorder = TrainProgress(), StepRecorder()
    probe = Probe(accelerator.device)
    train(
        accelerator,
        trainer,
        probe,
        progress,
        max_grad_norm=1.0,
        callbacks=[recorder],
    )
    assert [(info.step, info.loss) for info in recorder.infos] == list(enumerate(progress.losses, start=1))
    assert progress.completed_steps == len(probe.step_seconds) == 10
    batches = iter(trainer.batches)
    expected = [next(batches).token_counts for _ in range(10)]
    assert progress.token_counts.real == sum(counts.real for counts in expected)
    assert progress.token_counts.labelled == sum(counts.labelled for counts in expected) > 0


def test_steps_from_epochs(workshop: Workshop) -> None:
    """A length in epochs is in steps what covers the examples, rounded up: 24 examples, 1.5 epochs, 10 a step."""
    recipe = workshop.recipe(Full(), train={"steps": None, "epochs": 1.5, "global_batch_size": 10})
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    assert trainer_from(recipe, accelerator).total_steps == 4
