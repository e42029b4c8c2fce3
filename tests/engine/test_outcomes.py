"""However a run ends, its record says how."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import peftbench.engine.loop
from peftbench.data.batches import MicroBatch
from peftbench.data.sources import Files
from peftbench.engine.loss import summed_loss
from peftbench.methods.base import Method
from peftbench.methods.baselines import Lead, ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.optim import SGD
from peftbench.profiler.counter import FlopCounter
from peftbench.recipe import Profile
from peftbench.record import Memory, read_record
from peftbench.run import Run
from tests.conftest import Workshop, every_architecture, every_method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BadLoss = Callable[[nn.Module, MicroBatch], torch.Tensor]


def _from_call(number: int, then: Callable[[torch.Tensor], torch.Tensor]) -> BadLoss:
    """The true loss until a call, and from then on what ``then`` makes of it."""
    calls: list[int] = []

    def loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        calls.append(1)
        true = summed_loss(model, batch)
        return true if len(calls) < number else then(true)

    return loss


@every_architecture
@every_method
def test_a_run_that_ends_well(method: Method, architecture: str, workshop: Workshop) -> None:
    """A record holds what the recipe asked for: losses, steps, counts, parameters, and quality on every example."""
    record = workshop.run(workshop.recipe(method, architecture=architecture, train={"micro_batch": 4}))
    assert record.outcome.kind == "ok"
    assert record.steps == len(record.losses) == len(record.step_seconds) == 3
    assert record.examples == {"train": 24, "test": 8}
    assert record.tokens is not None
    assert record.tokens.padded >= record.tokens.real > record.tokens.labelled > 0
    assert record.tokens.virtual == 3 * 6 * method.virtual_tokens
    assert record.parameters is not None
    assert record.parameters.trainable > 0
    assert record.engine is not None
    assert (record.engine.micro_batch, record.engine.accumulation) == (3, 2)
    assert set(record.phase_seconds) == set(record.memory) == {"load", "build", "train", "evaluate"}
    assert record.quality is not None
    assert record.quality.examples == 8
    assert record.quality.loss is not None
    assert record.quality.perplexity == pytest.approx(math.exp(record.quality.loss))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_divergence(
    value: float, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of a run whose loss is not finite names that step and keeps every step before it."""
    monkeypatch.setattr(peftbench.engine.loop, "summed_loss", _from_call(3, lambda loss: loss * value))
    record = workshop.run(workshop.recipe(Full(), train={"steps": 5}))
    assert record.outcome.kind == "diverged"
    assert record.outcome.step == 3
    assert record.outcome.phase == "train"
    assert len(record.losses) == record.steps == 2
    assert all(math.isfinite(loss) for loss in record.losses)
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
    """A model is whole or not there, and no unfinished folder stays."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", interrupt)
    record = workshop.run(workshop.recipe(Lora(r=2), save_model=True))
    assert (record.outcome.kind, record.outcome.phase) == ("preempted", "save")
    assert [path.name for path in (workshop.output / "run").iterdir()] == ["record.json"]


def test_identity_is_of_what_was_trained_on(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity of the examples is taken before training: a source that is gone afterwards costs no record."""
    before = workshop.source.identity()

    def gone(_: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(Files, "identity", lambda _: pytest.fail("asked for once more"))
        return torch.ones((), requires_grad=True)

    monkeypatch.setattr(peftbench.engine.loop, "summed_loss", _from_call(1, gone))
    assert workshop.run(workshop.recipe(Full())).data_identity == before


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
    assert "gradient checkpointing was left out" in note
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

    monkeypatch.setattr(peftbench.engine.loop, "summed_loss", _from_call(2, fail))
    record = workshop.run(workshop.recipe(Full()))
    assert record.outcome.kind == "oom"
    assert (record.outcome.phase, record.outcome.step, record.outcome.requested_bytes) == ("train", 2, asked)
    assert record.steps == 1


def test_a_fault_is_recorded_and_raised(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the program is no result: the record says failed, and the fault goes on."""

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(peftbench.engine.loop, "summed_loss", _from_call(2, fail))
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

    monkeypatch.setattr(peftbench.engine.loop, "summed_loss", _from_call(3, interrupt))
    record = workshop.run(workshop.recipe(Full()))
    assert (record.outcome.kind, record.outcome.phase, record.outcome.step) == ("preempted", "train", 3)


@pytest.mark.parametrize("method", [ZeroShot(), Lead(sentences=1)], ids=["zero_shot", "lead"])
def test_a_baseline_is_a_run_without_training(method: Method, workshop: Workshop) -> None:
    """A baseline's record has quality and no training."""
    record = workshop.run(workshop.recipe(method, evaluate={"generate": True}))
    assert record.outcome.kind == "ok"
    assert record.quality is not None
    assert record.quality.rouge is not None
    assert record.losses == record.step_seconds == ()
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


@every_architecture
@every_method
def test_flops_of_a_run_are_those_of_its_steps(method: Method, architecture: str, workshop: Workshop) -> None:
    """Executed FLOPs in the record are what torch counts in the very same training; fewer are required."""
    recipe = workshop.recipe(method, architecture=architecture, train={"micro_batch": 4})
    plain = workshop.run(recipe)
    seen: list[int | None] = []
    true_step = peftbench.engine.loop.train_step

    def counted_step(*given: Any) -> float:
        with FlopCounter() as count:
            loss: float = true_step(*given)
        seen.append(count.total)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peftbench.engine.loop, "train_step", counted_step)
        assert workshop.run(recipe).losses == plain.losses
    assert len(seen) == 3
    assert plain.flops.executed == sum(count or 0 for count in seen) > 0
    assert plain.flops.required is not None
    assert 0 < plain.flops.required < plain.flops.executed
    assert plain.flops.six_n is not None


def test_what_cannot_be_counted_is_unknown(workshop: Workshop) -> None:
    """FLOPs that are not known are None in the record, and a note says why."""
    record = workshop.run(workshop.recipe(Lora(r=2, use_dora=True)))
    assert (record.flops.required, record.flops.executed) == (None, None)
    assert any("FLOPs are not known" in note for note in record.notes)


def test_warm_up_is_in_no_figure(workshop: Workshop) -> None:
    """Of five steps the first two train like the others, and time, tokens and FLOP/s are those of the last three."""
    recipe = workshop.recipe(Full(), train={"steps": 5}, profile=Profile(warmup_steps=2))
    record, plain = workshop.run(recipe), workshop.run(workshop.recipe(Full(), train={"steps": 5}))
    first = workshop.run(workshop.recipe(Full(), train={"steps": 2}))
    assert record.losses == plain.losses
    assert (record.warmup_steps, len(record.step_seconds)) == (2, 5)
    assert {"warmup", "train"} <= set(record.phase_seconds)
    assert record.throughput is not None
    assert record.throughput.steps == 3
    seconds = record.phase_seconds["train"]
    assert seconds >= sum(record.step_seconds[2:])
    assert plain.tokens is not None
    assert first.tokens is not None
    assert plain.flops.required is not None
    assert first.flops.required is not None
    tokens, flops = record.throughput.tokens_per_second.real, record.compute.required_per_second
    assert tokens * seconds == pytest.approx(plain.tokens.real - first.tokens.real)
    assert flops is not None
    assert flops * seconds == pytest.approx(plain.flops.required - first.flops.required)


@every_architecture
@every_method
def test_a_real_step_is_counted(method: Method, architecture: str, workshop: Workshop) -> None:
    """FLOPs of the first warm-up step, counted as torch dispatched them, are those in closed form; losses stay."""
    recipe = workshop.recipe(
        method, architecture=architecture, train={"micro_batch": 4}, profile=Profile(warmup_steps=1)
    )
    record, plain = workshop.run(recipe), workshop.run(workshop.recipe(method, architecture=architecture,
                                                                      train={"micro_batch": 4}))  # fmt: skip
    step = record.flops.counted_step
    assert step is not None
    assert step.step == 1
    assert 0 < step.counted == step.closed_form
    assert record.losses == plain.losses
    assert record.notes == ()
    assert plain.flops.counted_step is None  # no step could be slowed down


def test_what_has_no_closed_form_is_counted(workshop: Workshop) -> None:
    """DoRA's products are seen by torch's counter, though they follow no formula here."""
    step = workshop.run(workshop.recipe(Lora(r=2, use_dora=True), profile=Profile(warmup_steps=1))).flops.counted_step
    assert step is not None
    assert step.counted > 0
    assert step.closed_form is None


@every_method
def test_who_held_the_memory(method: Method, workshop: Workshop) -> None:
    """On request, the last warm-up step's peak is broken down; it changes no loss, and states are of known size."""
    profile = Profile(warmup_steps=2, breakdown=True)
    record = workshop.run(workshop.recipe(method, profile=profile, train={"steps": 4}))
    plain = workshop.run(workshop.recipe(method, train={"steps": 4}))
    assert record.losses == plain.losses
    assert plain.breakdown is None
    found, states = record.breakdown, record.state_bytes
    assert found is not None
    assert states is not None
    assert record.parameters is not None
    assert (found.step, found.rows) == (2, 6)
    assert sum(found.bytes_by_kind.values()) == found.peak_bytes > states.weights
    assert found.bytes_by_kind["weights"] == states.weights >= 4 * record.parameters.total
    assert states.gradients == 4 * record.parameters.trainable
    trained = states.gradients
    assert 2 * trained < states.optimizer == found.bytes_by_kind["optimizer_state"] < 2 * trained + 4 * 100
    assert found.part in {"forward", "backward", "optimizer"}
    assert found.operation.startswith("aten.")


def test_a_run_too_short_for_its_breakdown_has_none(workshop: Workshop) -> None:
    """A step that never came was not looked at."""
    record = workshop.run(workshop.recipe(Full(), profile=Profile(warmup_steps=5, breakdown=True), train={"steps": 2}))
    assert record.breakdown is None
    assert record.outcome.kind == "ok"


@dataclass
class GpuLike:
    """A meter as a GPU's: a peak for every part, and retries that must be counted once."""

    every_part: bool = True
    context_bytes: int | None = 11
    laps: int = 0

    def lap(self) -> Memory:
        """One retry each time it is read."""
        self.laps += 1
        return Memory(allocated_bytes=10**9, reserved_bytes=2 * 10**9, inactive_split_bytes=5, allocation_retries=1)

    def process_bytes(self) -> int | None:
        """What the driver says."""
        return 3 * 10**9

    def forget(self) -> None:
        """Nothing is held for no tensor."""


def test_a_gpu_s_figures_in_a_record(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, context, the driver's figure and every retry once, from the meter to the record."""
    monkeypatch.setattr("peftbench.profiler.probe.meter_for", lambda _: GpuLike())
    record = workshop.run(
        workshop.recipe(Full(), train={"steps": 5, "micro_batch": 3}, profile=Profile(warmup_steps=2))
    )
    assert set(record.step_memory) == {"forward", "backward", "optimizer"}
    steps, micro_batches = 3, 2
    retries = {part: memory.allocation_retries for part, memory in record.step_memory.items()}
    assert retries == {"forward": steps * micro_batches, "backward": steps * micro_batches, "optimizer": steps}
    assert record.memory_by_rank == ({phase: record.memory[phase] for phase in record.memory_by_rank[0]},)
    assert record.step_memory_by_rank == (record.step_memory,)
    train = record.memory["train"]
    # Once when each part ends, when each pause begins (that after the last warm-up step too) and when the phase ends.
    assert train.allocation_retries == steps * (2 * micro_batches + 1) + (steps + 1) + 1
    assert (train.allocated_bytes, train.process_bytes, record.context_bytes) == (10**9, 3 * 10**9, 11)
    assert train.fragmentation == 0.5
    assert set(record.part_seconds) == {"forward", "backward", "optimizer"}
    assert record.timed_steps == (2,)
