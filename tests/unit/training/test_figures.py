"""Figures of whole runs: FLOPs, warm-up, who held the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import peftbench.training.loop
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.recipe.schema import Profile
from peftbench.record import Memory
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    pass


@every_architecture
@every_method
def test_flops_of_a_run_are_those_of_its_steps(method: Method, architecture: str, workshop: Workshop) -> None:
    """Executed FLOPs in the record are what torch counts in the very same training; fewer are required."""
    recipe = workshop.recipe(method, architecture=architecture, train={"micro_batch_size": 4})
    plain = workshop.run(recipe)
    seen: list[int | None] = []
    true_step = peftbench.training.loop.train_step

    def counted_step(*given: Any) -> float:
        with FlopCounter() as count:
            loss: float = true_step(*given)
        seen.append(count.total)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peftbench.training.loop, "train_step", counted_step)
        assert workshop.run(recipe).step_losses == plain.step_losses
    assert len(seen) == 3
    assert plain.flops.hardware_flops == sum(count or 0 for count in seen) > 0
    assert plain.flops.model_flops is not None
    # Nothing is padded; attention's scores are computed once more in its backward pass, where it has one.
    assert (plain.flops.model_flops < plain.flops.hardware_flops) is not method.has_frozen_backbone
    assert 0 < plain.flops.model_flops <= plain.flops.hardware_flops
    assert plain.flops.six_n is not None


def test_what_cannot_be_counted_is_unknown(workshop: Workshop) -> None:
    """FLOPs that are not known are None in the record, and a note says why."""
    record = workshop.run(workshop.recipe(Lora(r=2, use_dora=True)))
    assert (record.flops.model_flops, record.flops.hardware_flops) == (None, None)
    assert any("FLOPs are unknown" in note for note in record.notes)


def test_warm_up_is_in_no_figure(workshop: Workshop) -> None:
    """Of five steps the first two train like the others, and time, tokens and FLOP/s are those of the last three."""
    recipe = workshop.recipe(Full(), train={"steps": 5}, profile=Profile(untimed_steps=2))
    record, plain = workshop.run(recipe), workshop.run(workshop.recipe(Full(), train={"steps": 5}))
    first = workshop.run(workshop.recipe(Full(), train={"steps": 2}))
    assert record.step_losses == plain.step_losses
    assert (record.untimed_steps, len(record.step_seconds)) == (2, 5)
    assert {"warmup", "train"} <= set(record.phase_seconds)
    assert record.throughput is not None
    assert record.throughput.steps == 3
    seconds = record.phase_seconds["train"]
    assert seconds >= sum(record.step_seconds[2:])
    assert plain.tokens is not None
    assert first.tokens is not None
    assert plain.flops.model_flops is not None
    assert first.flops.model_flops is not None
    tokens, flops = record.throughput.tokens_per_second.real, record.compute.model_flops_per_second
    assert tokens * seconds == pytest.approx(plain.tokens.real - first.tokens.real)
    assert flops is not None
    assert flops * seconds == pytest.approx(plain.flops.model_flops - first.flops.model_flops)


@every_architecture
@every_method
def test_a_real_step_is_counted(method: Method, architecture: str, workshop: Workshop) -> None:
    """FLOPs of the first warm-up step, counted as torch dispatched them, are those in closed form; losses stay."""
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
    assert plain.flops.counted_step is None  # no step could be slowed down


def test_what_has_no_closed_form_is_counted(workshop: Workshop) -> None:
    """DoRA's products are seen by torch's counter, though they follow no formula here."""
    step = workshop.run(workshop.recipe(Lora(r=2, use_dora=True), profile=Profile(untimed_steps=1))).flops.counted_step
    assert step is not None
    assert step.counted_flops > 0
    assert step.closed_form_flops is None


@every_method
def test_who_held_the_memory(method: Method, workshop: Workshop) -> None:
    """On request, the last warm-up step's peak is broken down; it changes no loss, and states are of known size."""
    profile = Profile(untimed_steps=2, memory_breakdown=True)
    record = workshop.run(workshop.recipe(method, profile=profile, train={"steps": 4}))
    plain = workshop.run(workshop.recipe(method, train={"steps": 4}))
    assert record.step_losses == plain.step_losses
    assert plain.memory_breakdown is None
    found, states = record.memory_breakdown, record.state_bytes
    assert found is not None
    assert states is not None
    assert record.parameters is not None
    assert (found.step, found.micro_batch_size) == (2, 1)  # in which all six examples are
    assert sum(found.bytes_by_category.values()) == found.peak_bytes > states.weights
    assert found.bytes_by_category["weights"] == states.weights >= 4 * record.parameters.total
    assert states.gradients == 4 * record.parameters.trainable
    trained = states.gradients
    assert 2 * trained < states.optimizer == found.bytes_by_category["optimizer_state"] < 2 * trained + 4 * 100
    assert found.step_part in {"forward", "backward", "optimizer"}
    assert found.operation.startswith("aten.")


def test_a_run_too_short_for_its_breakdown_has_none(workshop: Workshop) -> None:
    """A step that never came was not looked at."""
    record = workshop.run(
        workshop.recipe(Full(), profile=Profile(untimed_steps=5, memory_breakdown=True), train={"steps": 2})
    )
    assert record.memory_breakdown is None
    assert record.outcome.kind == "ok"


@dataclass
class GpuLike:
    """A meter as a GPU's: a peak for every part, and retries that must be counted once."""

    supports_step_parts: bool = True
    cuda_context_bytes: int | None = 11
    laps: int = 0

    def lap(self) -> Memory:
        """One retry each time it is read."""
        self.laps += 1
        return Memory(allocated_bytes=10**9, reserved_bytes=2 * 10**9, inactive_split_bytes=5, num_alloc_retries=1)

    def read_in_use_bytes(self) -> int | None:
        """What a status has; it is in no record."""
        return 7 * 10**9

    def read_process_bytes(self) -> int | None:
        """What the driver says."""
        return 3 * 10**9

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""

    def set_baseline(self) -> None:
        """Do nothing: there is no baseline."""


def test_a_gpu_s_figures_in_a_record(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, context, the driver's figure and every retry once, from the meter to the record."""
    monkeypatch.setattr("peftbench.profiler.probe.build_memory_meter", lambda _: GpuLike())
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
    # Once when each part ends, when each pause begins (that after the last warm-up step too) and when the phase ends.
    assert train.num_alloc_retries == steps * (2 * micro_batches + 1) + (steps + 1) + 1
    assert (train.allocated_bytes, train.process_bytes, record.cuda_context_bytes) == (10**9, 3 * 10**9, 11)
    assert train.fragmentation == 0.5
    assert set(record.step_part_seconds) == {"forward", "backward", "optimizer"}
    assert record.part_timed_steps == (2,)
