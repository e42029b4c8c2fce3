"""However a run ends, its record says how."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from peftbench.data.collate import MicroBatch
from peftbench.data.sources import Files
from peftbench.methods.base import Method
from peftbench.methods.baselines import Lead, ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.modeling.loss import LabelledLogitsLoss
from peftbench.optim import SGD
from peftbench.record import read_record
from peftbench.run.runner import Run
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BadLoss = Callable[[LabelledLogitsLoss, nn.Module, MicroBatch], torch.Tensor]


def _from_call(number: int, then: Callable[[torch.Tensor], torch.Tensor]) -> BadLoss:
    """The true loss until a call, and from then on what ``then`` makes of it."""
    calls: list[int] = []
    computed = LabelledLogitsLoss.__call__

    def loss(self: LabelledLogitsLoss, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        calls.append(1)
        true = computed(self, model, batch)
        return true if len(calls) < number else then(true)

    return loss


@every_architecture
@every_method
def test_a_run_that_ends_well(method: Method, architecture: str, workshop: Workshop) -> None:
    """A record holds what the recipe asked for: losses, steps, counts, parameters, and quality on every example."""
    record = workshop.run(workshop.recipe(method, architecture=architecture, train={"micro_batch_size": 4}))
    assert record.outcome.kind == "ok"
    assert record.steps == len(record.step_losses) == len(record.step_seconds) == 3
    assert record.num_examples == {"train": 24, "test": 8}
    assert record.tokens is not None
    assert record.tokens.padded >= record.tokens.real > record.tokens.labelled > 0
    assert record.tokens.virtual == 3 * 6 * method.virtual_tokens
    assert record.parameters is not None
    assert record.parameters.trainable > 0
    assert record.engine is not None
    assert (record.engine.micro_batch_size, record.engine.gradient_accumulation_steps) == (3, 2)
    assert set(record.phase_seconds) == set(record.memory) == {"load", "build", "train", "evaluate"}
    assert record.quality is not None
    assert record.quality.num_examples == 8
    assert record.quality.loss is not None
    assert record.quality.perplexity == pytest.approx(math.exp(record.quality.loss))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_divergence(
    value: float, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of a run whose loss is not finite names that step and keeps every step before it."""
    monkeypatch.setattr(LabelledLogitsLoss, "__call__", _from_call(3, lambda loss: loss * value))
    record = workshop.run(workshop.recipe(Full(), train={"steps": 5}))
    assert record.outcome.kind == "diverged"
    assert record.outcome.step == 3
    assert record.outcome.phase == "train"
    assert len(record.step_losses) == record.steps == 2
    assert all(math.isfinite(loss) for loss in record.step_losses)
    assert record.quality is None


def test_a_learning_rate_too_high_is_a_divergence(workshop: Workshop) -> None:
    """A real divergence is found too: the first step is finite, and one soon after is not."""
    recipe = workshop.recipe(Full(), optimizer=SGD(learning_rate=1e30), train={"steps": 8, "max_grad_norm": None})
    record = workshop.run(recipe)
    assert record.outcome.kind == "diverged"
    assert record.outcome.step is not None
    assert 2 <= record.outcome.step <= 8
    assert record.steps == record.outcome.step - 1
    assert read_record(workshop.output / "run" / "record.json") == record


def test_a_model_that_evaluates_to_no_number_diverged(workshop: Workshop) -> None:
    """Where the last step ruins the model, no later loss shows it: the held-out one does."""
    recipe = workshop.recipe(
        Full(), optimizer=SGD(learning_rate=1e30), train={"steps": 1, "max_grad_norm": None}, save_model=True
    )
    record = workshop.run(recipe)
    assert (record.outcome.kind, record.outcome.phase, record.outcome.step) == ("diverged", "evaluate", 1)
    assert record.steps == 1
    assert not (workshop.output / "run" / "model").exists()
    assert read_record(workshop.output / "run" / "record.json").outcome == record.outcome


def test_another_run_of_the_name_leaves_no_model_of_the_first(workshop: Workshop) -> None:
    """A run's model folder holds what that run saved: nothing of another method, nothing at all after a divergence."""
    folder = workshop.output / "run" / "model"
    workshop.run(workshop.recipe(Full(), save_model=True))
    assert (folder / "model.safetensors").exists()
    workshop.run(workshop.recipe(Lora(r=2), save_model=True))
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    diverging = workshop.recipe(
        Full(), optimizer=SGD(learning_rate=1e30), train={"steps": 8, "max_grad_norm": None}, save_model=True
    )
    assert workshop.run(diverging).outcome.kind == "diverged"
    assert not folder.exists()


def test_an_interrupt_while_saving_leaves_no_half_model(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is whole or not there, no unfinished folder stays, and saving is done again from what was kept."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    recipe = workshop.recipe(Lora(r=2), save_model=True)  # whose base is saved, too
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", interrupt)
    record = workshop.run(recipe)
    assert (record.outcome.kind, record.outcome.phase) == ("preempted", "save")
    left = {path.name for path in (workshop.output / "run").iterdir()}
    assert left == {".lock", "checkpoints", "record.json", "status.json"}  # what was trained is kept


def test_identity_is_of_what_was_trained_on(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity of the examples is taken before training: a source that is gone afterwards costs no record."""
    before = workshop.source.fingerprint()

    def gone(_: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(Files, "identity", lambda _: pytest.fail("asked for once more"))
        return torch.ones((), requires_grad=True)

    monkeypatch.setattr(LabelledLogitsLoss, "__call__", _from_call(1, gone))
    assert workshop.run(workshop.recipe(Full())).data_fingerprint == before


def test_steps_that_the_loss_scaler_took_back_are_counted(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose gradients overflowed in fp16 is a step without an update: counted, and the schedule waits for it."""
    from accelerate import Accelerator

    skipped = iter([True, True, False, False] + [False] * 20)  # asked twice a step
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda _: next(skipped)))
    record = workshop.run(workshop.recipe(Full(), train={"steps": 3}))
    assert (record.steps, record.skipped_steps) == (3, 1)


def test_checkpointing_of_a_frozen_trunk_is_left_out_and_said(workshop: Workshop) -> None:
    """What would cost memory instead of saving it is not done, and the record says so; elsewhere nothing is said."""
    wanted = {"gradient_checkpointing": True}
    (note,) = workshop.run(workshop.recipe(LastLayer(), train=wanted)).notes
    assert "gradient checkpointing is off" in note
    assert workshop.run(workshop.recipe(Lora(r=2), train=wanted)).notes == ()


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has"), 3 * 2**29),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), None),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 77 bytes."),
            77,
        ),
    ],
)
def test_running_out_of_memory_is_a_result(
    error: Exception, asked: int, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of a run that ran out of memory says where, and what was asked for."""

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(LabelledLogitsLoss, "__call__", _from_call(2, fail))
    record = workshop.run(workshop.recipe(Full()))
    assert record.outcome.kind == "oom"
    assert (record.outcome.phase, record.outcome.step, record.outcome.requested_bytes) == ("train", 2, asked)
    assert record.steps == 1


def test_a_fault_is_recorded_and_raised(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the program is no result: the record says failed, and the fault goes on."""

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(LabelledLogitsLoss, "__call__", _from_call(2, fail))
    with pytest.raises(ZeroDivisionError):
        Run(workshop.recipe(Full())).execute()
    record = read_record(workshop.output / "run" / "record.json")
    assert record.outcome.kind == "failed"
    assert record.outcome.error == "ZeroDivisionError: a fault"
    assert (record.outcome.phase, record.outcome.step) == ("train", 2)


def test_an_interrupted_run_is_recorded(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was interrupted says so, and where it was."""

    def interrupt(_: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(LabelledLogitsLoss, "__call__", _from_call(3, interrupt))
    record = workshop.run(workshop.recipe(Full()))
    assert (record.outcome.kind, record.outcome.phase, record.outcome.step) == ("preempted", "train", 3)


@pytest.mark.parametrize("method", [ZeroShot(), Lead(sentences=1)], ids=["zero_shot", "lead"])
def test_a_baseline_is_a_run_without_training(method: Method, workshop: Workshop) -> None:
    """A baseline's record has quality and no training."""
    record = workshop.run(workshop.recipe(method, evaluate={"generate": True}))
    assert record.outcome.kind == "ok"
    assert record.quality is not None
    assert record.quality.rouge is not None
    assert record.step_losses == record.step_seconds == ()
    assert record.tokens is None
    assert record.train_seconds is None
    assert not (workshop.output / "run" / "model").exists()


@every_method
def test_what_is_kept_can_be_used_by_itself(
    method: Method, workshop: Workshop, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The folder of a run's model loads with its tokenizer, without being told of a base or of this package."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = workshop.run(workshop.recipe(method, save_model=True))
    folder: Path = workshop.output / "run" / "model"
    is_adapter = (folder / "adapter_config.json").exists()
    kind: Any = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    loaded = kind.from_pretrained(folder)
    text = "harbour council vote"
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert torch.isfinite(loaded(input_ids=torch.tensor([ids])).logits).all()
    assert "save" in record.phase_seconds
    assert is_adapter == (json.dumps(method.kind) in ('"lora"', '"prompt_tuning"'))
