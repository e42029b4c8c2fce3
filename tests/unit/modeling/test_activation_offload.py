"""Activation offloading to host memory: gradients are unchanged, weights and small tensors stay on the device."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from peftbench.methods.full import Full
from peftbench.modeling.activation_offload import MIN_OFFLOAD_BYTES, ActivationOffload, _OffloadedTensor, _unpack
from tests.helpers.workshop import Workshop


def test_offloading_is_off_on_cpu_with_a_note(workshop: Workshop) -> None:
    """On CPU activations are already in host memory; losses do not change."""
    plain, offloaded = (
        workshop.run(workshop.recipe(Full(), train={"activation_offloading": enabled})) for enabled in (False, True)
    )
    assert offloaded.step_losses == plain.step_losses
    assert "activation offloading is off: on CPU, activations are already in host memory" in offloaded.notes
    assert plain.notes == ()


def test_only_large_activations_are_offloaded() -> None:
    """A large activation is copied, weights and small tensors are not; gradients are bit-identical."""
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
    assert all(torch.equal(plain, offloaded) for plain, offloaded in zip(*gradients, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_frees_gpu_memory_and_keeps_gradients() -> None:
    """Between the forward and backward pass, less than a quarter of the activation bytes is on the GPU."""
    width = 1024
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(4))).cuda()
    inputs = torch.randn(MIN_OFFLOAD_BYTES // width, width, device="cuda")
    gradients, live_bytes = [], []
    for offload in (False, True):
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        if offload:
            with ActivationOffload(model.parameters()):
                loss = model(inputs).square().mean()
        else:
            loss = model(inputs).square().mean()
        live_bytes.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert live_bytes[1] < live_bytes[0] / 4
    assert all(torch.equal(plain, offloaded) for plain, offloaded in zip(*gradients, strict=True))
    hooks = ActivationOffload(model.parameters())
    assert hooks._pack(model[0][0].weight) is model[0][0].weight  # type: ignore[index]
    assert isinstance(hooks._pack(inputs), _OffloadedTensor)
