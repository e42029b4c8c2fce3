"""One optimizer step: gradient clipping, the learning rate schedule and the returned loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from peftbench.distributed.accelerator import build_accelerator
from peftbench.errors import OutOfRangeError
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.optim import SGD, AdamW
from peftbench.profiler.probe import Probe
from peftbench.recipe.schema import Schedule
from peftbench.training.build import TrainingComponents
from peftbench.training.loop import TrainProgress, train, train_step
from tests.helpers.batches import LENGTHS_AND_PROMPTS, labels_of, logits, micro_batch, one_batch
from tests.helpers.callbacks import StepRecorder
from tests.helpers.training import assemble_training, build_training_components, trainable_parameters
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


def _update_norm(accelerator: Accelerator, model: PreTrainedModel, max_grad_norm: float | None) -> float:
    """Return the norm of one SGD update at learning rate 1, which equals the norm of the clipped gradient."""
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    trainer = assemble_training(accelerator, model, torch.optim.SGD(trainable_parameters(model).values(), lr=1.0))
    train_step(accelerator, trainer, one_batch(micro_batch()), max_grad_norm)
    squares = [
        ((parameter - before[name]).double() ** 2).sum() for name, parameter in trainable_parameters(model).items()
    ]
    return math.sqrt(sum(square.item() for square in squares))


def test_clipping_limits_the_gradient_norm(
    fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator
) -> None:
    """A larger gradient is scaled to the limit; a smaller one, or one without a limit, does not change."""
    norm = _update_norm(accelerator, fresh_base("gpt2_tied"), None)
    assert norm > 0.5
    assert _update_norm(accelerator, fresh_base("gpt2_tied"), 0.25) == pytest.approx(0.25, rel=1e-3)
    assert _update_norm(accelerator, fresh_base("gpt2_tied"), 2 * norm) == pytest.approx(norm, rel=1e-3)


def test_gradient_is_that_of_the_mean_loss_per_labeled_token(
    fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator
) -> None:
    """With two unequal micro-batches, the gradient equals that of transformers' logits and torch's loss."""
    parts = [micro_batch(LENGTHS_AND_PROMPTS[:2]), micro_batch(LENGTHS_AND_PROMPTS[2:])]
    model, reference = fresh_base("gpt2_tied"), fresh_base("gpt2_tied")
    losses = [
        cross_entropy(logits(reference, part)[:, :-1].mT, labels_of(part)[:, 1:], reduction="sum") for part in parts
    ]
    (sum(losses) / 27).backward()  # type: ignore[union-attr]
    accelerator.gradient_accumulation_steps = len(parts)
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    trainer = assemble_training(accelerator, model, torch.optim.SGD(trainable_parameters(model).values(), lr=1.0))
    train_step(accelerator, trainer, one_batch(*parts), None)
    for name, parameter in trainable_parameters(reference).items():
        update = before[name] - trainable_parameters(model)[name].detach()
        torch.testing.assert_close(update, parameter.grad, rtol=1e-3, atol=1e-6)


def test_step_returns_the_loss_before_its_update(
    fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator
) -> None:
    """The loss is that of the weights at the start of the step, and the gradients are cleared after it."""
    model = fresh_base("gpt2_tied")
    trainer = assemble_training(accelerator, model, torch.optim.SGD(trainable_parameters(model).values(), lr=0.1))
    first, second = (train_step(accelerator, trainer, one_batch(micro_batch()), None) for _ in range(2))
    same_model = fresh_base("gpt2_tied")
    without_update = assemble_training(
        accelerator, same_model, torch.optim.SGD(trainable_parameters(same_model).values(), lr=0.0)
    )
    assert train_step(accelerator, without_update, one_batch(micro_batch()), None) == first
    assert second < first
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def _trainer(workshop: Workshop, **parts: Any) -> tuple[Accelerator, TrainingComponents]:
    recipe = workshop.recipe(Lora(r=2), train={"steps": 10}, **parts)
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    return accelerator, build_training_components(recipe, accelerator)


def _expected_rate(kind: str, warmup: int, steps: int, step: int) -> float:
    """Return the fraction of the peak learning rate at ``step``, counted from 0."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[kind]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_follows_the_schedule(kind: str, warmup: int, workshop: Workshop) -> None:
    """The optimizer uses the rate of the schedule's formula in every step, and callbacks receive it."""
    accelerator, trainer = _trainer(
        workshop,
        schedule=Schedule.model_validate({"kind": kind, "warmup_steps": warmup}),
        optimizer=AdamW(learning_rate=2e-3),
    )
    rates: list[float] = []
    recorder = StepRecorder()
    optimizer = trainer.optimizer.optimizer  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    train(
        accelerator,
        trainer,
        Probe(accelerator.device),
        TrainProgress(),
        max_grad_norm=None,
        callbacks=[recorder],
    )
    assert rates == pytest.approx([2e-3 * _expected_rate(kind, warmup, 10, index) for index in range(10)])
    assert [info.learning_rate for info in recorder.infos] == rates


def test_optimizer_has_the_recipe_s_settings_and_the_trained_parameters(workshop: Workshop) -> None:
    """It is of the recipe's class, and its parameters are exactly those that require a gradient."""
    _, trainer = _trainer(workshop, optimizer=SGD(learning_rate=0.5, momentum=0.9, weight_decay=0.01))
    optimizer = trainer.optimizer.optimizer  # type: ignore[attr-defined]
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["initial_lr"]) == (0.9, 0.01, 0.5)
    assert {id(p) for p in group["params"]} == {id(p) for p in trainable_parameters(trainer.model).values()}
    assert group["params"]


def test_train_calls_callbacks_and_counts_tokens(workshop: Workshop) -> None:
    """Callbacks receive each step once, in order, and the token counts are the sum over all batches."""
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
    assert progress.token_counts.labeled == sum(counts.labeled for counts in expected) > 0


def test_epochs_are_converted_to_steps(workshop: Workshop) -> None:
    """24 examples, 1.5 epochs and 10 examples per step are 4 steps, rounded up."""
    recipe = workshop.recipe(Full(), train={"steps": None, "epochs": 1.5, "global_batch_size": 10})
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    assert build_training_components(recipe, accelerator).total_steps == 4


@pytest.mark.parametrize(
    ("epochs", "warmup", "is_refused"), [(1.5, 4, True), (1.5, 40, True), (1.5, 3, False), (0.1, 1, True)]
)
def test_warmup_must_leave_a_step_of_the_epochs(
    epochs: float, warmup: int, is_refused: bool, workshop: Workshop
) -> None:
    """Epochs are compared once they are steps; the error has both numbers, and nothing is written."""
    train_keys = {"steps": None, "epochs": epochs, "global_batch_size": 10}
    steps = math.ceil(epochs * 24 / 10)
    folder = workshop.output / "out"
    schedule = Schedule(warmup_steps=warmup)
    recipe = workshop.recipe(Lora(), train=train_keys, schedule=schedule, output_dir=str(folder))
    if is_refused:
        sentence = rf"schedule\.warmup_steps={warmup} must be less than the number of training steps \({steps}\)"
        with pytest.raises(OutOfRangeError, match=sentence):
            workshop.run(recipe)
        assert not folder.exists()
    else:
        assert workshop.run(recipe).steps == steps
