"""LISA trains embeddings, head, final norm and a few blocks, which are chosen again every few steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from peftbench.distributed.accelerator import build_accelerator
from peftbench.errors import CombinationError, OptimizerError
from peftbench.memory.devices import UNKNOWN_DEVICE
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.optim import Lisa
from peftbench.optim.roles import ParameterRoles, list_blocks
from peftbench.recipe.schema import Checkpoint, Profile, Schedule
from peftbench.record import RunRecord
from peftbench.training.loop import train_step
from tests.helpers.stopped_runs import run_until_first_checkpoint
from tests.helpers.training import build_training_components
from tests.helpers.workshop import Workshop

RATE, DECAY = 1e-3, 0.1


def build_parameters(*sizes: int) -> ParameterRoles:
    """Return blocks of these sizes."""
    return ParameterRoles(blocks=tuple((nn.Parameter(torch.ones(size)),) for size in sizes))


def list_all(roles: ParameterRoles) -> list[nn.Parameter]:
    """Return the parameters of all blocks."""
    return [parameter for block in roles.blocks for parameter in block]


def test_choice_depends_on_the_seed_and_the_interval_alone() -> None:
    """The choice is constant within an interval, and after some intervals each block has been chosen."""
    kind = Lisa(num_blocks=2, interval=5)
    choices = [kind.choose_blocks(6, step, 0) for step in range(100)]
    assert all(len(choice) == 2 for choice in choices)
    assert all(choices[step] == choices[step - step % 5] for step in range(100))
    assert set().union(*choices) == set(range(6))
    assert [kind.choose_blocks(6, step, 0) for step in range(100)] == choices
    assert [kind.choose_blocks(6, step, 1) for step in range(100)] != choices


def test_first_step_is_adamw_s_and_frozen_blocks_do_not_move(workshop: Workshop) -> None:
    """All weights outside the blocks change; inside the blocks, only those of the chosen block change."""
    kind = Lisa(learning_rate=RATE, weight_decay=DECAY, num_blocks=1)
    recipe = workshop.recipe(
        Full(), architecture="llama_untied", optimizer=kind, schedule=Schedule(kind="constant"), model={"dropout": 0.0}
    )
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    training = build_training_components(recipe, accelerator)
    blocks = list_blocks(training.model)
    (chosen,) = kind.choose_blocks(len(blocks), 0, recipe.train.seed)
    frozen = {id(p) for index, block in enumerate(blocks) if index != chosen for p in block}
    before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
    training.start_step(0)
    train_step(accelerator, training, next(iter(training.batches)), max_grad_norm=None)
    for name, parameter in training.model.named_parameters():
        if id(parameter) in frozen:
            assert torch.equal(parameter, before[name]), name
            continue
        moved = (parameter.detach() - before[name] * (1 - RATE * DECAY)).abs()
        has_gradient = moved > RATE / 2  # tokens that do not occur have none
        assert float(moved[has_gradient].median()) == pytest.approx(RATE, rel=1e-2), name
        assert float(moved.max()) < RATE * 1.001, name


def test_states_and_gradients_of_frozen_blocks_are_freed() -> None:
    """After another choice, only its blocks have states; a block that is in both choices keeps them."""
    kind = Lisa(num_blocks=1, interval=1)
    roles = build_parameters(10, 10)
    optimizer = kind.build(list_all(roles), roles)
    steps = next(
        pair
        for pair in itertools.pairwise(range(50))
        if kind.choose_blocks(2, pair[0], 0) != kind.choose_blocks(2, pair[1], 0)
    )
    for step in steps:
        kind.start_step(optimizer, step, 0)
        (chosen,) = kind.choose_blocks(2, step, 0)
        trained = [parameter for parameter in list_all(roles) if parameter.requires_grad]
        assert trained == list(roles.blocks[chosen])
        for parameter in trained:
            parameter.grad = torch.ones(10)
        optimizer.step()
        assert [id(parameter) for parameter in optimizer.state] == [id(parameter) for parameter in trained]
        assert kind.state_bytes(optimizer.param_groups) == 2 * 4 * 10 + 4
        assert [p for p in list_all(roles) if p.grad is not None] == trained


def run_counted(workshop: Workshop, seed: int, optimizer: Lisa) -> RunRecord:
    """Run a training whose second step is counted."""
    return workshop.run(
        workshop.recipe(
            Full(),
            name=f"seed{seed}",
            optimizer=optimizer,
            data={"padding": "max_length"},
            train={"steps": 4, "seed": seed},
            profile=Profile(untimed_steps=2),
        )
    )


def test_counted_flops_equal_the_closed_form_for_every_choice(workshop: Workshop) -> None:
    """The choices of two seeds differ, and the FLOPs of a token do not; training both blocks costs more."""
    kind = Lisa(num_blocks=1)
    seeds = (0, next(seed for seed in range(1, 20) if kind.choose_blocks(2, 0, seed) != kind.choose_blocks(2, 0, 0)))
    records = [run_counted(workshop, seed, kind) for seed in seeds]
    records.append(run_counted(workshop, 99, Lisa(num_blocks=2)))
    flops = []
    for record in records:
        counted = record.flops.counted_step
        assert counted is not None
        assert counted.counted_flops == counted.closed_form_flops
        assert record.tokens is not None
        assert record.flops.model_flops is not None
        flops.append(record.flops.model_flops)
        states = record.state_bytes
        assert states is not None
        assert states.optimizer == states.expected_optimizer
    assert flops[0] == flops[1] < flops[2]
    assert "lisa trains 1 of 2 blocks at a time, chosen again every 20 steps" in records[0].notes


def test_resume_after_the_last_step_has_its_states(workshop: Workshop) -> None:
    """No step follows, and the state bytes are those of the blocks that the last step trained."""
    settings: dict[str, Any] = {"optimizer": Lisa(num_blocks=1, interval=2), "train": {"steps": 4}}
    whole = workshop.run(workshop.recipe(Full(), name="whole", **settings))
    recipe = workshop.recipe(Full(), name="stopped", checkpoint=Checkpoint(interval=4), **settings)
    run_until_first_checkpoint(workshop, recipe)
    resumed = workshop.run(recipe)
    assert resumed.resumed_after == (4,)
    assert resumed.state_bytes == whole.state_bytes
    assert resumed.quality == whole.quality


def test_plan_has_the_flops_of_the_run(workshop: Workshop) -> None:
    """The FLOPs are the same before and after the optimizer is built. A note describes the planned choice."""
    recipe = workshop.recipe(
        Full(), optimizer=Lisa(num_blocks=1), data={"padding": "max_length"}, train={"steps": 1, "logits": "all"}
    )
    simulation = MemorySimulation(recipe, UNKNOWN_DEVICE.capability, 1)
    assert (
        "the plan is for the blocks that lisa chooses first; the peak can differ for other blocks" in simulation.notes
    )
    size = (recipe.train.global_batch_size, recipe.data.max_length or 0, 1)
    planned = [simulation.step_flops(*size)]
    with simulation:
        planned.append(simulation.step_flops(*size))
    assert planned == [workshop.run(recipe).flops.hardware_flops] * 2


def test_model_with_too_few_or_unequal_blocks_is_refused() -> None:
    """The choice needs enough blocks; with unequal blocks, steps would differ in FLOPs."""
    few, unequal = build_parameters(4), build_parameters(4, 5)
    with pytest.raises(
        OptimizerError, match=r"optimizer.num_blocks=2 is more than the 1 blocks of this model; lower it"
    ):
        Lisa(num_blocks=2).build(list_all(few), few)
    with pytest.raises(OptimizerError, match=r"blocks of several sizes; use optimizer\.kind=adamw"):
        Lisa(num_blocks=1).build(list_all(unequal), unequal)


def test_method_that_freezes_weights_is_refused(workshop: Workshop) -> None:
    """The error names the method and an optimizer that runs."""
    with pytest.raises(
        CombinationError, match=r"method\.kind=lora with optimizer\.kind=lisa .* use optimizer\.kind=adamw"
    ):
        build_accelerator(workshop.recipe(Lora(r=2), optimizer=Lisa()), workshop.output)
