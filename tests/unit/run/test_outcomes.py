"""The record of a run has the right outcome, however the run ends."""

from __future__ import annotations

import math
import signal
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
from peftbench.modeling.loss import LabeledLogitsLoss
from peftbench.optim import SGD
from peftbench.record import RunRecord, read_record
from peftbench.run.runner import Run
from peftbench.run.shutdown import ShutdownSignal
from peftbench.run_dir.saved_model import has_model_of
from peftbench.run_dir.status import StatusWriter
from tests.helpers.methods import every_method
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BadLoss = Callable[[LabeledLogitsLoss, nn.Module, MicroBatch], torch.Tensor]


def fail_from_call(number: int, replace_loss: Callable[[torch.Tensor], torch.Tensor]) -> BadLoss:
    """Return a loss function that applies ``replace_loss`` to the true loss from call ``number`` on."""
    num_calls = 0
    true_loss = LabeledLogitsLoss.__call__

    def loss(self: LabeledLogitsLoss, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        value = true_loss(self, model, batch)
        return value if num_calls < number else replace_loss(value)

    return loss


def raise_error(error: BaseException) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that raises ``error``."""

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise error

    return fail


def check_successful_record(record: RunRecord, method: Method) -> None:
    """Check that a record has losses, steps, counts, parameters and the quality on every example."""
    assert record.outcome.kind == "ok"
    assert record.steps == len(record.step_losses) == len(record.step_seconds) == 3
    assert record.num_examples == {"train": 24, "test": 8}
    assert record.tokens is not None
    assert record.tokens.padded >= record.tokens.real > record.tokens.labeled > 0
    assert record.tokens.virtual == 3 * 6 * method.virtual_tokens
    assert record.parameters is not None
    assert record.parameters.trainable > 0
    assert record.engine is not None
    assert (record.engine.micro_batch_size, record.engine.gradient_accumulation_steps) == (3, 2)
    assert set(record.phase_seconds) == set(record.memory) >= {"load", "build", "train", "evaluate"}
    assert record.quality is not None
    assert record.quality.num_examples == 8
    assert record.quality.loss is not None
    assert record.quality.perplexity == pytest.approx(math.exp(record.quality.loss))


@every_method
def test_successful_run(method: Method, workshop: Workshop, tokenizer: PreTrainedTokenizerBase) -> None:
    """The record is complete, and the saved model loads with its tokenizer by transformers or peft alone."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = workshop.run(workshop.recipe(method, save_model=True, train={"micro_batch_size": 4}))
    check_successful_record(record, method)
    assert "save" in record.phase_seconds
    folder: Path = workshop.output / "run" / "model"
    is_adapter = (folder / "adapter_config.json").exists()
    assert is_adapter == (method.kind in {"lora", "prompt_tuning"})
    model_class: Any = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    model = model_class.from_pretrained(folder)
    text = "harbour council vote"
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert torch.isfinite(model(input_ids=torch.tensor([ids])).logits).all()


@pytest.mark.parametrize("architecture", ["llama_tied", "llama_untied"])
def test_successful_run_of_other_architectures(architecture: str, workshop: Workshop) -> None:
    """The record is complete for rotary positions and linear layers, with a tied or untied head."""
    method = Lora(r=4)
    record = workshop.run(workshop.recipe(method, architecture=architecture, train={"micro_batch_size": 4}))
    check_successful_record(record, method)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_is_a_divergence(value: float, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record names the step with the first loss that is not finite, and keeps all steps before it."""
    monkeypatch.setattr(LabeledLogitsLoss, "__call__", fail_from_call(3, lambda loss: loss * value))
    record = workshop.run(workshop.recipe(Full(), train={"steps": 5}))
    assert (record.outcome.kind, record.outcome.step, record.outcome.phase) == ("diverged", 3, "train")
    assert len(record.step_losses) == record.steps == 2
    assert all(math.isfinite(loss) for loss in record.step_losses)
    assert record.quality is None


def test_held_out_loss_that_is_not_finite_is_a_divergence(workshop: Workshop) -> None:
    """If the last step ruins the weights, the held-out loss reports it."""
    recipe = workshop.recipe(
        Full(), optimizer=SGD(learning_rate=1e30), train={"steps": 1, "max_grad_norm": None}, save_model=True
    )
    record = workshop.run(recipe)
    assert (record.outcome.kind, record.outcome.phase, record.outcome.step) == ("diverged", "evaluate", 1)
    assert record.steps == 1
    assert (workshop.output / "run" / "model").exists()
    assert read_record(workshop.output / "run" / "record.json").outcome == record.outcome


def test_new_run_replaces_the_saved_model(workshop: Workshop) -> None:
    """The model folder has only files of the last run that finished its training: a divergence keeps the old model."""
    folder = workshop.output / "run" / "model"
    workshop.run(workshop.recipe(Full(), save_model=True))
    assert (folder / "model.safetensors").exists()
    kept = workshop.run(workshop.recipe(Lora(r=2), save_model=True))
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    diverging = workshop.recipe(
        Full(), optimizer=SGD(learning_rate=1e30), train={"steps": 8, "max_grad_norm": None}, save_model=True
    )
    record = workshop.run(diverging)
    assert record.outcome.kind == "diverged"
    assert record.outcome.step is not None
    assert 2 <= record.outcome.step <= 8
    assert record.steps == record.outcome.step - 1
    assert read_record(workshop.output / "run" / "record.json") == record
    assert has_model_of(workshop.output / "run", kept)
    assert not has_model_of(workshop.output / "run", record)


def test_run_that_saves_no_model_deletes_the_old_one(workshop: Workshop) -> None:
    """Its record replaces the one that described the model."""
    workshop.run(workshop.recipe(Lora(r=2), save_model=True))
    workshop.run(workshop.recipe(Lora(r=2)))
    assert not (workshop.output / "run" / "model").exists()


def test_interrupt_while_saving_leaves_no_partial_model(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a partial nor a complete model folder remains; the training's checkpoint does."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    recipe = workshop.recipe(Lora(r=2), save_model=True)  # which saves the base model too
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", interrupt)
    record = workshop.run(recipe)
    assert (record.outcome.kind, record.outcome.phase) == ("preempted", "save")
    assert record.outcome.error == "stopped by an interrupt; checkpoint of step 3"
    names = {path.name for path in (workshop.output / "run").iterdir()}
    assert names == {".lock", "checkpoints", "record.json", "status.json"}


def test_data_fingerprint_is_computed_before_training(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data source that is deleted during training does not affect the record."""
    fingerprint = workshop.source.fingerprint()

    def remove_source(_: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(Files, "fingerprint", lambda *_: pytest.fail("computed again"))
        return torch.ones((), requires_grad=True)

    monkeypatch.setattr(LabeledLogitsLoss, "__call__", fail_from_call(1, remove_source))
    assert workshop.run(workshop.recipe(Full())).data_fingerprint == fingerprint


def test_steps_skipped_by_the_loss_scaler_are_counted(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose fp16 gradients overflowed is counted as skipped."""
    from accelerate import Accelerator

    skipped = iter([True, True, False, False] + [False] * 20)  # read twice per step
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda _: next(skipped)))
    record = workshop.run(workshop.recipe(Full(), train={"steps": 3}))
    assert (record.steps, record.skipped_steps) == (3, 1)


def test_gradient_checkpointing_of_a_frozen_backbone_is_skipped(workshop: Workshop) -> None:
    """With a frozen backbone it would only cost memory, so the record has a note instead; with lora it is applied."""
    train = {"gradient_checkpointing": True}
    (note,) = workshop.run(workshop.recipe(LastLayer(), train=train)).notes
    assert "gradient checkpointing" in note.lower()
    assert workshop.run(workshop.recipe(Lora(r=2), train=train)).notes == ()


def test_out_of_memory_is_an_outcome(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has the phase, the step, the part of the step, and the requested bytes."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")
    monkeypatch.setattr(LabeledLogitsLoss, "__call__", fail_from_call(2, raise_error(error)))
    record = workshop.run(workshop.recipe(Full()))
    outcome = record.outcome
    assert (outcome.kind, outcome.phase, outcome.step, outcome.step_part) == ("oom", "train", 2, "forward")
    assert outcome.requested_bytes == 3 * 2**29
    assert record.steps == 1


def test_bug_is_recorded_and_raised(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other exception is raised, after a record with outcome failed was written."""
    error = ZeroDivisionError("a bug")
    monkeypatch.setattr(LabeledLogitsLoss, "__call__", fail_from_call(2, raise_error(error)))
    with pytest.raises(ZeroDivisionError):
        Run(workshop.recipe(Full())).execute()
    outcome = read_record(workshop.output / "run" / "record.json").outcome
    assert (outcome.kind, outcome.error) == ("failed", "ZeroDivisionError: a bug")
    assert (outcome.phase, outcome.step) == ("train", 2)


def test_interrupt_is_recorded(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outcome of an interrupted run is preempted, with the current step."""
    monkeypatch.setattr(LabeledLogitsLoss, "__call__", fail_from_call(3, raise_error(KeyboardInterrupt())))
    record = workshop.run(workshop.recipe(Full()))
    assert (record.outcome.kind, record.outcome.phase, record.outcome.step) == ("preempted", "train", 3)


def test_signal_while_a_run_starts_is_recorded(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment when the folder shows the run, a stop request ends it with a record."""
    shutdown_signal = ShutdownSignal()

    def receive_signal(_writer: StatusWriter, phase: str) -> None:
        if phase == "starting":
            shutdown_signal._handle_signal(signal.SIGTERM, None)

    monkeypatch.setattr(StatusWriter, "set_phase", receive_signal)
    record, _ = Run(workshop.recipe(Full()), shutdown_signal).execute()
    assert (record.outcome.kind, record.outcome.error) == ("preempted", "stopped by SIGTERM")


@pytest.mark.parametrize("method", [ZeroShot(), Lead(sentences=1)], ids=["zero_shot", "lead"])
def test_baseline_run(method: Method, workshop: Workshop) -> None:
    """The record of a baseline has quality, no training and no saved model."""
    record = workshop.run(workshop.recipe(method, evaluate={"metrics": None}))
    assert record.outcome.kind == "ok"
    assert record.quality is not None
    assert set(record.quality.metrics) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert record.step_losses == record.step_seconds == ()
    assert record.tokens is None
    assert record.train_seconds is None
    assert not (workshop.output / "run" / "model").exists()
