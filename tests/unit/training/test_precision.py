"""Precision: unsupported ones are refused, and trained weights stay in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from peftbench.distributed.accelerator import build_accelerator
from peftbench.errors import EngineError, PrecisionError
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.optim.stochastic_rounding import AdamW8bitBf16, AdamWBf16
from peftbench.profiler.probe import Probe
from peftbench.training.loop import TrainProgress, train, train_step
from tests.helpers.methods import every_method, one_method_fast
from tests.helpers.training import (
    build_adapted_model,
    build_training_components,
    reset_accelerators,
    trainable_parameters,
)
from tests.helpers.workshop import Workshop


class DtypeRecorder(TorchFunctionMode):
    """Records the dtypes of linear layers' outputs, of logits (outputs of the vocabulary's size) and of losses."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.hidden: set[torch.dtype] = set()
        self.logits: set[torch.dtype] = set()
        self.losses: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in {functional.linear, torch.addmm}:
            (self.logits if result.shape[-1] == self.vocabulary else self.hidden).add(result.dtype)
        if func is functional.cross_entropy:
            self.losses.add(result.dtype)
        return result


def test_fp16_on_cpu_is_refused(workshop: Workshop) -> None:
    """The error lists the precisions that a CPU supports."""
    with pytest.raises(PrecisionError, match=r"fp16 needs a GPU.*use bf16 or fp32"):
        build_accelerator(workshop.recipe(Full(), train={"precision": "fp16"}), workshop.output)


def test_emulated_bf16_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without native bf16 the run does not start; the error has the GPU's name."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    with pytest.raises(PrecisionError, match=r"bf16 is not supported by Old GPU.*use fp16 or fp32"):
        build_accelerator(workshop.recipe(Full(), train={"precision": "bf16"}), workshop.output)


def test_wrong_world_size_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the launcher started two processes and one joined the process group, the run does not start."""
    recipe = workshop.recipe(Full())
    build_accelerator(recipe, workshop.output)  # accelerate's state now has world size 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="started 2 processes, and 1 joined the process group"):
        build_accelerator(recipe, workshop.output)


@every_method
def test_bf16_keeps_trained_weights_in_float32(method: Method, workshop: Workshop) -> None:
    """The forward pass is in bfloat16; losses, trained weights and optimizer states are in float32."""
    recipe = workshop.recipe(method, train={"precision": "bf16", "steps": 2})
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    built = build_adapted_model(recipe, accelerator)
    trainer = build_training_components(recipe, accelerator, built)
    method.set_training(built.model)
    dtypes = DtypeRecorder(built.base.model.config.vocab_size)
    progress = TrainProgress()
    with trainer.loss.attention_context(), dtypes:
        train(accelerator, trainer, Probe(accelerator.device), progress, max_grad_norm=1.0)
    assert dtypes.hidden == {torch.bfloat16}
    assert dtypes.logits == {torch.bfloat16}
    assert dtypes.losses == {torch.float32}
    assert progress.completed_steps == 2
    assert {parameter.dtype for parameter in trainable_parameters(built.model).values()} == {torch.float32}
    states = trainer.optimizer.optimizer.state  # type: ignore[attr-defined]
    assert len(states) == len(trainable_parameters(built.model)) > 0
    assert {state["exp_avg"].dtype for state in states.values()} == {torch.float32}


def test_bf16_loss_is_close_to_fp32(workshop: Workshop) -> None:
    """The first loss differs by rounding only."""
    losses = {}
    for precision in ("fp32", "bf16"):
        reset_accelerators()
        recipe = workshop.recipe(Full(), train={"precision": precision})
        accelerator = build_accelerator(recipe, workshop.output).accelerator
        trainer = build_training_components(recipe, accelerator)
        losses[precision] = train_step(accelerator, trainer, next(iter(trainer.batches)), max_grad_norm=None)
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_fp16_base_model_is_loaded_in_float32(workshop: Workshop) -> None:
    """The shipped base model is saved in fp16."""
    recipe = workshop.recipe(Full(), model={"path": "shipped"})
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    model = build_adapted_model(recipe, accelerator).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@one_method_fast("last_layer")
@pytest.mark.parametrize("kind", [pytest.param(AdamWBf16, marks=pytest.mark.slow), AdamW8bitBf16])
def test_bf16_parameters_train_on_a_float32_base(
    kind: type[AdamWBf16 | AdamW8bitBf16], method: Method, workshop: Workshop
) -> None:
    """With mixed dtypes, e.g. a bf16 head on a float32 backbone, the loss decreases and attention needs no masks."""
    recipe = workshop.recipe(method, train={"precision": "bf16"}, optimizer=kind(learning_rate=1e-2))
    record = workshop.run(recipe)
    assert record.outcome.kind == "ok"
    assert record.step_losses[-1] < record.step_losses[0]
    assert not [note for note in record.notes if "attention runs in transformers" in note]
