"""A cap refuses what is above it, to the page, and counts nothing but what comes after it."""

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
import json, sys
import torch
from peftbench.memory.limit import hold

MIB = 2**20
cap = hold(256 * MIB, torch.device("cpu"), None)
at_first = cap.held_bytes()
tensor = torch.ones(100 * MIB, dtype=torch.uint8)
with_one = cap.held_bytes()
refused = []
for size in (150, 200):
    try:
        other = torch.ones(size * MIB, dtype=torch.uint8)
        del other
    except RuntimeError as error:
        refused.append((size, str(error)))
del tensor
without = cap.held_bytes()
cap.lift()
more = torch.ones(400 * MIB, dtype=torch.uint8).numel()
print(json.dumps({"at_first": at_first, "with_one": with_one, "without": without, "refused": refused, "more": more}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA holds a process on Linux alone")
def test_a_process_is_held_on_cpu() -> None:
    """Beside 100 MiB, of 256, 150 find room and 200 do not; freed memory counts no more; a lifted cap holds nothing."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["at_first"] < MIB
    assert 100 * MIB <= told["with_one"] - told["at_first"] < 101 * MIB
    assert told["without"] - told["at_first"] < MIB
    ((size, words),) = told["refused"]
    assert size == 200
    assert f"you tried to allocate {200 * MIB} bytes" in words
    assert told["more"] == 400 * MIB


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A T4 that is told what fraction of it may be taken."""
    fractions: list[float] = []
    total = int(get_device_facts("t4").memory)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="Tesla T4", total_memory=total)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: fractions.append(share))
    told = {"reserved_bytes": {"all": {"current": 7, "peak": 9}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: told)
    return fractions


@pytest.mark.parametrize("context", [None, 400 * MIB, 2048 * MIB])
def test_the_allocator_is_held_on_cuda(context: int | None, gpu: list[float]) -> None:
    """To the budget less workspaces and the context, the larger of what was measured and what is known."""
    facts, device = get_device_facts("t4"), torch.device("cuda", 0)
    held = limit_memory(8 * 2**30, device, context)
    beside = max(context or 0, int(facts.context[1])) + int(facts.workspaces[1])
    assert held.tensor_bytes == 8 * 2**30 - beside
    assert gpu == [held.tensor_bytes / int(facts.memory)]
    assert int(gpu[0] * int(facts.memory)) in {held.tensor_bytes, held.tensor_bytes - 1}
    assert held.read_in_use_bytes() == 7
    held.release()
    assert gpu[1:] == [1.0]


def test_budgets_that_cannot_be(gpu: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the device, or all taken by what is beside tensors: each in one sentence, and nothing is held."""
    device = torch.device("cuda", 0)
    with pytest.raises(BudgetError, match=r"more than the 15,633,\d+,\d+ of Tesla T4; give less, or take it out"):
        limit_memory(16 * 2**30, device, None)
    with pytest.raises(BudgetError, match=r"no more than the .* that a process holds of Tesla T4 beside its tensors"):
        limit_memory(1400 * MIB, device, None)
    assert gpu == []
    with pytest.raises(BudgetError, match="of this machine; give less"):
        limit_memory(2**50, torch.device("cpu"), None)
    with pytest.raises(BudgetError, match="that a process on CPU takes beside its tensors; give more"):
        limit_memory(2 * MIB, torch.device("cpu"), None)
    monkeypatch.setattr(limit, "status_bytes", lambda _: None)
    with pytest.raises(BudgetError, match="on Linux alone; take it out"):
        limit_memory(2**30, torch.device("cpu"), None)


def test_a_device_without_a_file_is_taken_at_its_most(gpu: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is known of a device, as much as of any is left for its context."""
    other = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: other)
    held = limit_memory(16 * 2**30, torch.device("cuda", 0), None)
    assert held.tensor_bytes == 16 * 2**30 - int(UNKNOWN_DEVICE.context[1]) - int(UNKNOWN_DEVICE.workspaces[1])
