"""The snapshot of an out-of-memory, on a real CUDA allocator."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from peftbench.profiler.memory_snapshot import dump_on_oom, record_memory_history

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_refusal_shows_who_held_the_memory(tmp_path: Path) -> None:
    """What was there when the allocator refused is in the file, with the function that made it."""
    path = tmp_path / "oom_snapshot.pickle"
    told: list[int] = []
    dump_on_oom(path, lambda: told.append(torch.cuda.memory_allocated()))
    with record_memory_history():
        held = torch.ones(64 * 2**20, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(2**44, dtype=torch.uint8, device="cuda")
    assert told[0] >= held.numel()
    snapshot = pickle.loads(path.read_bytes())  # noqa: S301 — written above
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    (found,) = [block for block in blocks if block["size"] == held.numel()]
    assert any(frame["name"] == "test_a_refusal_shows_who_held_the_memory" for frame in found["frames"])
