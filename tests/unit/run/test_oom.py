"""What a run may have, and what it has of that now."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from peftbench.memory.limit import MemoryLimit
from peftbench.methods.full import Full
from peftbench.recipe.schema import Budget
from peftbench.run.oom import OomHandler
from tests.helpers.workshop import Workshop
from tests.unit.profiler.test_probe_peaks import Counters

GIB = 2**30


class Holding(Counters):
    """A meter of a device that holds so much."""

    def read_in_use_bytes(self) -> int | None:
        """Three GiB."""
        return 3 * GIB


@pytest.mark.parametrize(
    ("device", "budget", "expected"),
    [("cpu", None, None), ("cpu", "8GiB", 8 * GIB), ("cuda:0", None, 80 * GIB), ("cuda:0", "8GiB", 8 * GIB)],
)
def test_a_budget_or_the_device(
    device: str, budget: str | None, expected: int | None, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget counts before the GPU's memory; a CPU without one has none."""
    there = SimpleNamespace(name="Some GPU", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: there)
    recipe = workshop.recipe(Full(), budget=Budget(memory=budget))
    shortage = OomHandler(recipe, torch.device(device), workshop.output, 0)
    assert shortage.budget_bytes == expected


def test_what_is_held_of_it(workshop: Workshop) -> None:
    """As the budget counts it, with what that leaves for all beside tensors; or as the device's meter tells it."""
    shortage = OomHandler(workshop.recipe(Full()), torch.device("cpu"), workshop.output, 0)
    assert shortage.held_bytes(Holding()) == 3 * GIB
    shortage.memory_limit = MemoryLimit(8 * GIB, 7 * GIB, read_in_use_bytes=lambda: 5 * GIB, release=lambda: None)
    assert shortage.held_bytes(Holding()) == 6 * GIB
