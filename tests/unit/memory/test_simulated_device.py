"""Steered calls on the meta device cast as often as torch's own autocast does on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from peftbench.memory.simulation.device import DeviceEmulation


class Casts(TorchDispatchMode):
    """Counts casts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def casts_of(device: str, block: AbstractContextManager[Any], *, trained: bool) -> tuple[int, torch.dtype]:
    """How often two products with one weight cast, and the type of what comes out."""
    weight = nn.Parameter(torch.zeros(4, 4, device=device), requires_grad=trained)
    inputs = torch.zeros(2, 4, device=device)
    with Casts() as casts, block:
        made = functional.linear(functional.linear(inputs, weight), weight)
    return casts.count, made.dtype


@pytest.mark.parametrize("trained", [True, False])
def test_copies_of_weights_are_kept_as_long_as_autocast_keeps_them(trained: bool) -> None:
    """One copy of a trained weight for all its uses, and one for each use of a frozen one."""
    real = casts_of("cpu", torch.autocast("cpu", dtype=torch.bfloat16), trained=trained)
    steering = DeviceEmulation("cpu", torch.bfloat16, has_padding=True)
    with steering:
        assert casts_of("meta", steering.autocast(), trained=trained) == real
        assert casts_of("meta", steering.autocast(), trained=trained) == real  # no copy outlives its block
        assert casts_of("meta", steering.autocast(enabled=False), trained=trained) == (0, torch.float32)
    assert real[0] == (2 if trained else 3)
