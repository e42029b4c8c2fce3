"""Large CPU tensors in simulations: allocated, and never written."""

from __future__ import annotations

import psutil
import torch

from peftbench.memory.simulation.values import FakeScalars


def test_cpu_tensors_may_exceed_the_memory_of_the_machine() -> None:
    """A tensor of twice the machine's memory is created, copied, and changed."""
    numel = 2 * psutil.virtual_memory().total // 4
    before = psutil.Process().memory_info().rss
    with FakeScalars():
        zeros = torch.zeros(numel, device="cpu")
        offloaded = torch.empty(numel, device="meta").to("cpu")
        zeros.add_(offloaded.clone())
    assert zeros.untyped_storage().nbytes() == offloaded.untyped_storage().nbytes() == 4 * numel
    assert psutil.Process().memory_info().rss - before < 2**28
