"""Bytes of weights, gradients and optimizer states between steps."""

from __future__ import annotations

import torch
from torch import nn

from peftbench.distributed.engines import SINGLE
from peftbench.distributed.sharding import state_bytes
from peftbench.optim import AdamW
from peftbench.record import StateBytes


def test_state_bytes_match_known_sizes() -> None:
    """A tied weight counts once, a frozen one has no gradient; AdamW has two moments and a step counter per tensor."""
    model = nn.Module()
    model.first, model.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    model.tied, model.frozen = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
    model.tied.weight = model.first.weight
    model.frozen.weight.requires_grad_(False)
    model.register_buffer("mask", torch.ones(10, dtype=torch.bool))
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    assert state_bytes(SINGLE, model, optimizer, AdamW(), "cpu") == StateBytes(
        weights=4 * (64 + 64 + 32) + 10, gradients=512, optimizer=0, expected_optimizer=2 * 512 + 2 * 4
    )
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    measured = state_bytes(SINGLE, model, optimizer, AdamW(), "cpu")
    assert measured is not None
    assert measured.optimizer == measured.expected_optimizer == 2 * 512 + 2 * 4
    assert measured.total == measured.weights + measured.gradients + measured.optimizer == 650 + 512 + 1032
