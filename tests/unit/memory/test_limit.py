"""A memory limit refuses allocations above it, to the page, and counts only allocations after it was set."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from peftbench.errors import BudgetError
from peftbench.memory import limit
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts
from peftbench.memory.limit import limit_memory

MIB = 2**20
_SCRIPT = """
import ctypes, json, sys
import torch
from peftbench.memory import limit as memory_limit
from peftbench.memory.limit import limit_memory

torch.set_num_threads(1)  # the stack of a thread counts as memory in use
if sys.argv[1] == "without":
    memory_limit._import_libraries = lambda: None
MIB = 2**20
limit = limit_memory(256 * MIB, torch.device("cpu"), None)
at_first = limit.read_in_use_bytes()
tensor = torch.ones(100 * MIB, dtype=torch.uint8)
with_one = limit.read_in_use_bytes()
refused = []
for size in (150, 200):
    try:
        other = torch.ones(size * MIB, dtype=torch.uint8)
        del other
    except RuntimeError as error:
        refused.append((size, str(error)))
del tensor
without = limit.read_in_use_bytes()
limit.release()
more = torch.ones(400 * MIB, dtype=torch.uint8).numel()

library = ctypes.CDLL("libc.so.6")
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
blocks = [library.malloc(40 * 1024) for _ in range(2560)]
for block in blocks[:-1]:  # the last one keeps the heap from being trimmed
    library.free(block)
limit_memory(64 * MIB, torch.device("cpu"), None)
tensors = []
try:
    while len(tensors) < 1000:
        tensors.append(torch.ones(MIB, dtype=torch.uint8))
except RuntimeError:
    pass
names = ("at_first", "with_one", "without", "refused", "more")
print(json.dumps({name: globals()[name] for name in names} | {"in_heap": len(tensors)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits memory only on Linux")
@pytest.mark.parametrize("libraries", ["without", pytest.param("with", marks=pytest.mark.slow)])
def test_cpu_limit_refuses_larger_allocations(libraries: str) -> None:
    """With 100 of 256 MiB in use, 150 MiB fit and 200 do not; freed memory is available; release removes the limit.

    Then 100 MiB of the heap are free: tensors in them count against the next budget of 64 MiB. Setting a limit also
    imports the libraries of a run, which takes seconds; the fast test omits these imports.
    """
    process = subprocess.run(
        [sys.executable, "-c", _SCRIPT, libraries], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["at_first"] < MIB
    assert 100 * MIB <= result["with_one"] - result["at_first"] < 101 * MIB
    assert result["without"] - result["at_first"] < MIB
    ((size, message),) = result["refused"]
    assert size == 200
    assert f"you tried to allocate {200 * MIB} bytes" in message
    assert result["more"] == 400 * MIB
    assert 56 <= result["in_heap"] <= 64


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Patch torch to a T4 and return the list of memory fractions that are set."""
    fractions: list[float] = []
    total = get_device_facts("t4").least_memory
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="Tesla T4", total_memory=total)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: fractions.append(share))
    stats = {"reserved_bytes": {"all": {"current": 7, "peak": 9}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: stats)
    return fractions


@pytest.mark.parametrize("context", [None, 400 * MIB, 2048 * MIB])
def test_cuda_limit_is_the_budget_minus_overhead(context: int | None, gpu: list[float]) -> None:
    """The limit is the budget minus workspaces and the larger of the measured and the profile's context."""
    facts, device = get_device_facts("t4"), torch.device("cuda", 0)
    active = limit_memory(8 * 2**30, device, context)
    overhead = max(context or 0, int(facts.context[1])) + int(facts.workspaces[1])
    assert active.tensor_bytes == 8 * 2**30 - overhead
    assert gpu == [active.tensor_bytes / facts.least_memory]
    assert int(gpu[0] * facts.least_memory) in {active.tensor_bytes, active.tensor_bytes - 1}
    assert active.read_in_use_bytes() == 7
    active.release()
    assert gpu[1:] == [1.0]


def test_invalid_budgets_are_refused(gpu: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget larger than the device or without room for tensors sets no limit."""
    device = torch.device("cuda", 0)
    with pytest.raises(BudgetError, match=r"exceeds the 14\.6 GiB of Tesla T4; decrease or remove it"):
        limit_memory(16 * 2**30, device, None)
    with pytest.raises(BudgetError, match=r"no room for tensors: .* on Tesla T4 need"):
        limit_memory(1400 * MIB, device, None)
    assert gpu == []
    with pytest.raises(BudgetError, match="of this machine; decrease or remove it"):
        limit_memory(2**50, torch.device("cpu"), None)
    with pytest.raises(BudgetError, match="that a CPU process needs in addition to its tensors; increase it"):
        limit_memory(2 * MIB, torch.device("cpu"), None)
    monkeypatch.setattr(limit, "read_proc_status_bytes", lambda _: None)
    with pytest.raises(BudgetError, match="only on Linux; remove it"):
        limit_memory(2**30, torch.device("cpu"), None)


def test_unknown_device_uses_maximum_overhead(gpu: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The maximum context and workspaces of UNKNOWN_DEVICE are subtracted."""
    properties = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    active = limit_memory(16 * 2**30, torch.device("cuda", 0), None)
    assert active.tensor_bytes == 16 * 2**30 - int(UNKNOWN_DEVICE.context[1]) - int(UNKNOWN_DEVICE.workspaces[1])
