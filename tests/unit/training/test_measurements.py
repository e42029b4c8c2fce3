"""Measurements of whole runs: FLOPs, untimed steps and the memory breakdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import peftbench.training.loop
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.recipe.schema import Profile
from peftbench.record import Memory
from tests.helpers.methods import ONE_OF_EACH, one_method_fast
from tests.helpers.models import ARCHITECTURES
from tests.helpers.sweeps import mark_slow
from tests.helpers.workshop import Workshop

POINTS = mark_slow(
    [(method, architecture) for method in ONE_OF_EACH.values() for architecture in ARCHITECTURES],
    keep=lambda point: point[1] == "gpt2_tied" and point[0].kind in {"last_layer", "prompt_tuning"},
    seed=5,
)
"""Every method on every architecture."""


@pytest.mark.parametrize(("method", "architecture"), POINTS)
def test_hardware_flops_match_torch_s_counter(method: Method, architecture: str, workshop: Workshop) -> None:
    """Torch counts the FLOPs of the same training; model FLOPs are at most as many."""
    recipe = workshop.recipe(method, architecture=architecture, train={"micro_batch_size": 4})
    plain = workshop.run(recipe)
    counts: list[int | None] = []
    original_step = peftbench.training.loop.train_step

    def counted_step(*args: Any, **kwargs: Any) -> float:
        with FlopCounter() as counter:
            loss: float = original_step(*args, **kwargs)
        counts.append(counter.total_flops)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peftbench.training.loop, "train_step", counted_step)
        assert workshop.run(recipe).step_losses == plain.step_losses
    assert len(counts) == 3
    assert plain.flops.hardware_flops == sum(count or 0 for count in counts) > 0
    assert plain.flops.model_flops is not None
    # Nothing is padded. The backward pass of attention computes the scores again; a frozen backbone has none.
    assert (plain.flops.model_flops < plain.flops.hardware_flops) is not method.has_frozen_backbone
    assert 0 < plain.flops.model_flops <= plain.flops.hardware_flops
    assert plain.flops.six_n is not None


def test_unknown_flops_are_none(workshop: Workshop) -> None:
    """Without a closed form the record has None and a note with the reason."""
    record = workshop.run(workshop.recipe(Lora(r=2, use_dora=True)))
    assert (record.flops.model_flops, record.flops.hardware_flops) == (None, None)
    assert any("FLOPs are unknown" in note for note in record.notes)


def test_untimed_steps_are_excluded_from_throughput(workshop: Workshop) -> None:
    """With two untimed steps of five, the losses do not change; time, tokens and FLOP/s are those of the last three."""
    recipe = workshop.recipe(Full(), train={"steps": 5}, profile=Profile(untimed_steps=2))
    record, plain = workshop.run(recipe), workshop.run(workshop.recipe(Full(), train={"steps": 5}))
    untimed = workshop.run(workshop.recipe(Full(), train={"steps": 2}))
    assert record.step_losses == plain.step_losses
    assert (record.untimed_steps, len(record.step_seconds)) == (2, 5)
    assert {"warmup", "train"} <= set(record.phase_seconds)
    assert record.throughput is not None
    assert record.throughput.steps == 3
    seconds = record.phase_seconds["train"]
    assert seconds >= sum(record.step_seconds[2:])
    assert plain.tokens is not None
    assert untimed.tokens is not None
    assert plain.flops.model_flops is not None
    assert untimed.flops.model_flops is not None
    tokens, flops = record.throughput.tokens_per_second.real, record.compute.model_flops_per_second
    assert tokens * seconds == pytest.approx(plain.tokens.real - untimed.tokens.real)
    assert flops is not None
    assert flops * seconds == pytest.approx(plain.flops.model_flops - untimed.flops.model_flops)


@pytest.mark.parametrize(("method", "architecture"), POINTS)
def test_counted_flops_of_an_untimed_step_match_the_closed_form(
    method: Method, architecture: str, workshop: Workshop
) -> None:
    """Torch counts the operations of the first untimed step; the losses do not change."""
    recipe = workshop.recipe(
        method, architecture=architecture, train={"micro_batch_size": 4}, profile=Profile(untimed_steps=1)
    )
    record, plain = (
        workshop.run(recipe),
        workshop.run(workshop.recipe(method, architecture=architecture, train={"micro_batch_size": 4})),
    )
    step = record.flops.counted_step
    assert step is not None
    assert step.step == 1
    assert 0 < step.counted_flops == step.closed_form_flops
    assert record.step_losses == plain.step_losses
    assert record.notes == ()
    assert plain.flops.counted_step is None  # without untimed steps, counting would slow a timed one


def test_flops_without_a_closed_form_are_counted(workshop: Workshop) -> None:
    """Torch's counter includes DoRA's products, for which peftbench has no formula."""
    step = workshop.run(workshop.recipe(Lora(r=2, use_dora=True), profile=Profile(untimed_steps=1))).flops.counted_step
    assert step is not None
    assert step.counted_flops > 0
    assert step.closed_form_flops is None


@one_method_fast("lora")
def test_memory_breakdown_matches_the_known_state_sizes(method: Method, workshop: Workshop) -> None:
    """The peak of the last untimed step is broken down on request; the losses do not change."""
    profile = Profile(untimed_steps=2, memory_breakdown=True)
    record = workshop.run(workshop.recipe(method, profile=profile, train={"steps": 4}))
    plain = workshop.run(workshop.recipe(method, train={"steps": 4}))
    assert record.step_losses == plain.step_losses
    assert plain.memory_breakdown is None
    breakdown, states = record.memory_breakdown, record.state_bytes
    assert breakdown is not None
    assert states is not None
    assert record.parameters is not None
    assert (breakdown.step, breakdown.micro_batch_size) == (2, 1)  # one packed row of all six examples
    assert sum(breakdown.bytes_by_category.values()) == breakdown.peak_bytes > states.weights
    assert breakdown.bytes_by_category["weights"] == states.weights >= 4 * record.parameters.total
    assert states.gradients == 4 * record.parameters.trainable
    gradients = states.gradients
    assert 2 * gradients < states.optimizer == breakdown.bytes_by_category["optimizer_state"] < 2 * gradients + 4 * 100
    assert breakdown.step_part in {"forward", "backward", "optimizer"}
    assert breakdown.operation.startswith("aten.")


def test_run_shorter_than_its_untimed_steps_has_no_breakdown(workshop: Workshop) -> None:
    """The breakdown is taken in the last untimed step, which this run does not reach."""
    record = workshop.run(
        workshop.recipe(Full(), profile=Profile(untimed_steps=5, memory_breakdown=True), train={"steps": 2})
    )
    assert record.memory_breakdown is None
    assert record.outcome.kind == "ok"


@dataclass
class FakeGpuMeter:
    """Fakes a GPU's memory meter: a peak for each step part, and one allocation retry per reading."""

    supports_step_parts: bool = True
    cuda_context_bytes: int | None = 11
    laps: int = 0

    def lap(self, *, within_steps: bool = False) -> Memory:
        """Return a reading with one retry."""
        self.laps += 1
        return Memory(allocated_bytes=10**9, reserved_bytes=2 * 10**9, inactive_split_bytes=5, num_alloc_retries=1)

    def read_in_use_bytes(self) -> int | None:
        """Return the memory in use, which the status has and the record does not."""
        return 7 * 10**9

    def read_process_bytes(self) -> int | None:
        """Return the process's memory as the driver reports it."""
        return 3 * 10**9

    def empty_cache(self) -> None:
        """Do nothing: the fake has no cache."""

    def set_baseline(self) -> None:
        """Do nothing: the fake has no baseline."""


def test_record_has_the_readings_of_a_gpu_meter(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has each step part, the CUDA context, the driver's value, and every retry counted once."""
    monkeypatch.setattr("peftbench.profiler.probe.build_memory_meter", lambda _: FakeGpuMeter())
    record = workshop.run(
        workshop.recipe(Full(), train={"steps": 5, "micro_batch_size": 3}, profile=Profile(untimed_steps=2))
    )
    assert set(record.step_memory) == {"forward", "backward", "optimizer"}
    steps, micro_batches = 3, 2
    retries = {part: memory.num_alloc_retries for part, memory in record.step_memory.items()}
    assert retries == {"forward": steps * micro_batches, "backward": steps * micro_batches, "optimizer": steps}
    assert record.memory_by_rank == ({phase: record.memory[phase] for phase in record.memory_by_rank[0]},)
    assert record.step_memory_by_rank == (record.step_memory,)
    train = record.memory["train"]
    # One reading at the end of each step part, at the start of each pause (after the last untimed step too), and at
    # the end of the phase.
    assert train.num_alloc_retries == steps * (2 * micro_batches + 1) + (steps + 1) + 1
    assert (train.allocated_bytes, train.process_bytes, record.cuda_context_bytes) == (10**9, 3 * 10**9, 11)
    assert train.fragmentation == 0.5
    assert set(record.step_part_seconds) == {"forward", "backward", "optimizer"}
    assert record.part_timed_steps == (2,)
