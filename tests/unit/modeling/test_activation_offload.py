"""Activations in the CPU's memory: the same gradients, and nothing moved that stays anyway."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from peftbench.methods.full import Full
from peftbench.modeling.activation_offload import MIN_OFFLOAD_BYTES, ActivationOffload, _OffloadedTensor, _unpack
from tests.helpers.workshop import Workshop


def test_on_cpu_nothing_moves_and_it_is_said(workshop: Workshop) -> None:
    """There they are already; the losses are those without."""
    plain, offloaded = (
        workshop.run(workshop.recipe(Full(), train={"activation_offloading": switch})) for switch in (False, True)
    )
    assert offloaded.step_losses == plain.step_losses
    assert "activation offloading is off: on CPU, activations are already in host memory" in offloaded.notes
    assert plain.notes == ()


def test_what_moves_and_what_comes_back() -> None:
    """Activations alone: the copy is another tensor of the same values, and gradients are the same to the last bit."""
    width = 1024
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2)))
    inputs = torch.randn(MIN_OFFLOAD_BYTES // width, width)
    hooks = ActivationOffload(model.parameters(), "cpu")
    weight = model[0][0].weight  # type: ignore[index]
    assert hooks._pack(weight) is weight
    assert hooks._pack(weight.t()).untyped_storage()._cdata == weight.untyped_storage()._cdata  # type: ignore[union-attr]
    small = torch.ones(8)
    assert hooks._pack(small) is small
    packed = hooks._pack(inputs)
    assert isinstance(packed, _OffloadedTensor)
    assert packed.tensor.data_ptr() != inputs.data_ptr()
    assert torch.equal(_unpack(packed), inputs)
    gradients = []
    for offload in (False, True):
        model.zero_grad()
        with ActivationOffload(model.parameters(), "cpu") if offload else nullcontext():
            loss = model(inputs).square().mean()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_activations_leave_the_gpu_and_gradients_are_the_same() -> None:
    """Between the passes the GPU holds weights and small tensors alone."""
    width = 1024
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(4))).cuda()
    inputs = torch.randn(MIN_OFFLOAD_BYTES // width, width, device="cuda")
    gradients, held = [], []
    for offload in (False, True):
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        if offload:
            with ActivationOffload(model.parameters()):
                loss = model(inputs).square().mean()
        else:
            loss = model(inputs).square().mean()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert held[1] < held[0] / 4
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    hooks = ActivationOffload(model.parameters())
    assert hooks._pack(model[0][0].weight) is model[0][0].weight  # type: ignore[index]
    assert isinstance(hooks._pack(inputs), _OffloadedTensor)
