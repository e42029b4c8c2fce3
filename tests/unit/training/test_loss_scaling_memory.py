"""Loss scaling of fp16 unscales gradients in place, so a plan needs no copy of them."""

from __future__ import annotations

import torch

from tests.helpers.live_bytes import LiveBytes


def test_unscaling_and_clipping_allocate_no_copy_of_the_gradients() -> None:
    """The peak rises by scalars alone; torch has one in-place operation for both devices."""
    weights = [torch.nn.Parameter(torch.zeros(256, 256)) for _ in range(4)]
    optimizer = torch.optim.AdamW(weights, foreach=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    live = LiveBytes("cpu")
    for weight in weights:
        weight.grad = torch.full_like(weight, 8.0)
        live.add(weight)
        live.add(weight.grad)
    scaler.scale(torch.zeros(()))
    before = live.peak = live.live
    with live:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1e9, foreach=True)
    assert all(torch.equal(weight.grad, torch.ones_like(weight)) for weight in weights if weight.grad is not None)
    assert live.peak - before < 256
