"""Muon steps hidden matrices with orthogonalized updates, and AdamW steps everything else, in one optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peftbench.distributed.accelerator import build_accelerator
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.optim import Muon
from peftbench.optim.muon import MATRIX_KEY
from peftbench.optim.roles import find_roles
from tests.helpers.training import build_training_components
from tests.helpers.workshop import Workshop

RATE, DECAY = 1e-2, 0.1


def step_once(**keys: Any) -> tuple[list[nn.Parameter], list[torch.Tensor], list[torch.Tensor]]:
    """Return a tall and a wide matrix and a vector after a step, with their values before it and their gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((48, 16), (16, 48), (16,))]
    before = [parameter.detach().clone() for parameter in parameters]
    gradients = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    optimizer = Muon(learning_rate=RATE, weight_decay=DECAY, **keys).build(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    return parameters, before, gradients


@pytest.mark.parametrize(
    ("adjust_lr_fn", "scales"), [("match_rms_adamw", (0.2 * 48**0.5,) * 2), ("original", (3**0.5, 1))]
)
def test_first_step_is_the_orthogonal_factor_of_the_gradient(adjust_lr_fn: str, scales: tuple[float, float]) -> None:
    """The update is the polar factor of the singular value decomposition; Newton-Schulz gives values of 0.7 to 1.2."""
    parameters, before, gradients = step_once(adjust_lr_fn=adjust_lr_fn)
    for parameter, old, gradient, scale in zip(parameters[:2], before[:2], gradients[:2], scales, strict=True):
        update = (old * (1 - RATE * DECAY) - parameter.detach()) / (RATE * scale)
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        rotated = left.T @ update @ right.T
        assert float(rotated.diagonal().min()) > 0.65
        assert float(rotated.diagonal().max()) < 1.25
        assert float((rotated - torch.diag(rotated.diagonal())).abs().max()) < 0.03


def test_vectors_are_stepped_by_adamw_at_their_own_rate() -> None:
    """The first step of AdamW moves by the rate against the gradient's sign."""
    parameters, before, gradients = step_once(adamw_learning_rate=3e-3)
    expected = before[2] * (1 - 3e-3 * DECAY) - 3e-3 * gradients[2].sign()
    assert torch.allclose(parameters[2].detach(), expected, atol=1e-6)


def test_momentum_without_nesterov_changes_the_second_step() -> None:
    """Options reach torch's Muon."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn((2, 16, 16), generator=generator)
    ends = []
    for keys in ({}, {"nesterov": False}, {"momentum": 0.5}, {"ns_steps": 2}):
        parameter = nn.Parameter(torch.zeros(16, 16))
        optimizer = Muon(learning_rate=RATE, **keys).build([parameter])
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert all(not torch.equal(ends[0], end) for end in ends[1:])


@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
def test_embeddings_head_norms_and_biases_are_not_orthogonalized(architecture: str, workshop: Workshop) -> None:
    """Only the matrices inside the blocks are orthogonalized; a tied head counts as an embedding."""
    recipe = workshop.recipe(Full(), architecture=architecture, optimizer=Muon())
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    training = build_training_components(recipe, accelerator)
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    matrices = {
        names[id(p)] for group in training.optimizer.param_groups if MATRIX_KEY in group for p in group["params"]
    }
    blocks = {id(parameter) for block in find_roles(training.model).blocks for parameter in block}
    assert matrices == {name for (name, p) in training.model.named_parameters() if id(p) in blocks and p.ndim == 2}
    assert sum(len(group["params"]) for group in training.optimizer.param_groups) == len(names)


def test_one_schedule_scales_both_rates(workshop: Workshop) -> None:
    """The warm-up multiplies the rate of each group."""
    optimizer = Muon(learning_rate=1e-2, adamw_learning_rate=1e-3)
    recipe = workshop.recipe(Full(), optimizer=optimizer, schedule={"kind": "constant", "warmup_steps": 2})
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    training = build_training_components(recipe, accelerator)
    training.optimizer.step()
    training.lr_scheduler.step()
    assert [group["lr"] for group in training.optimizer.param_groups] == pytest.approx([1e-2 / 2, 1e-3 / 2])


@pytest.mark.parametrize(
    ("method", "has_matrices"),
    [(Lora(r=4), True), pytest.param(LastLayer(), False, marks=pytest.mark.slow)],
    ids=["lora", "last_layer"],
)
def test_note_counts_the_parameters_of_each_rule(method: Method, has_matrices: bool, workshop: Workshop) -> None:
    """A method that trains no hidden matrix is stepped by AdamW alone, which the record notes."""
    record = workshop.run(workshop.recipe(method, train={"steps": 1}, optimizer=Muon()))
    assert record.parameters is not None
    trained = record.parameters.trainable
    matrices = trained if has_matrices else 0
    note = f"muon steps the {matrices} parameters in hidden matrices, and AdamW the other {trained - matrices}"
    assert note in record.notes
