"""Memory limit of a run, and recognition of out-of-memory errors."""

from __future__ import annotations

import errno
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


class InUseMeter(Counters):
    """A memory meter that reads 3 GiB."""

    def read_in_use_bytes(self) -> int | None:
        """Return 3 GiB."""
        return 3 * GIB


@pytest.mark.parametrize(
    ("device", "budget", "expected"),
    [("cpu", None, None), ("cpu", "8GiB", 8 * GIB), ("cuda:0", None, 80 * GIB), ("cuda:0", "8GiB", 8 * GIB)],
)
def test_limit_is_the_budget_or_the_gpu_memory(
    device: str, budget: str | None, expected: int | None, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget takes precedence over the GPU's memory; a CPU without a budget has no limit."""
    properties = SimpleNamespace(name="Some GPU", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    recipe = workshop.recipe(Full(), budget=Budget(memory=budget))
    assert OomHandler(recipe, torch.device(device), workshop.output, 0).budget_bytes == expected


def test_held_bytes_include_the_allowance_of_the_limit(workshop: Workshop) -> None:
    """With a limit, its allowance for memory outside tensors is added; without one, the meter's value is returned."""
    handler = OomHandler(workshop.recipe(Full()), torch.device("cpu"), workshop.output, 0)
    assert handler.held_bytes(InUseMeter()) == 3 * GIB
    handler.memory_limit = MemoryLimit(8 * GIB, 7 * GIB, read_in_use_bytes=lambda: 5 * GIB, release=lambda: None)
    assert handler.held_bytes(InUseMeter()) == 6 * GIB


@pytest.mark.parametrize(
    ("error", "is_oom", "requested_bytes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has"), True, 3 * 2**29),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, None),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True, None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 77 bytes."), True, 77),
        (MemoryError(), True, None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True, None),
        (OSError(errno.ENOSPC, "No space left on device"), False, None),
        (RuntimeError("could not create a primitive"), False, None),
    ],
)
def test_is_oom_recognizes_every_allocator(
    error: Exception, is_oom: bool, requested_bytes: int | None, workshop: Workshop
) -> None:
    """The outcome has the requested size if the message contains it."""
    handler = OomHandler(workshop.recipe(Full()), torch.device("cpu"), workshop.output, 0)
    assert handler.is_oom(error) == is_oom
    outcome = handler.build_outcome(error, {"phase": "train", "step": 2, "step_part": "forward"}, None)
    assert outcome.requested_bytes == requested_bytes
    assert outcome.error == (str(error).splitlines()[0] if str(error) else type(error).__name__)


def test_failed_primitive_is_out_of_memory_under_a_limit(workshop: Workshop) -> None:
    """OneDNN reports a failed allocation as a failed primitive; without a limit that has other causes."""
    handler = OomHandler(workshop.recipe(Full()), torch.device("cpu"), workshop.output, 0)
    handler.memory_limit = MemoryLimit(8 * GIB, 7 * GIB, read_in_use_bytes=lambda: 5 * GIB, release=lambda: None)
    assert handler.is_oom(RuntimeError("could not create a primitive"))
