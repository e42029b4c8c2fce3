"""The memory snapshot after an out-of-memory error of the real CUDA allocator."""

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


def test_snapshot_shows_live_blocks(tmp_path: Path) -> None:
    """A block that was live at the error is in the file, with the function that allocated it."""
    path = tmp_path / "oom_snapshot.pickle"
    allocated: list[int] = []
    dump_on_oom(path, lambda: allocated.append(torch.cuda.memory_allocated()))
    with record_memory_history():
        tensor = torch.ones(64 * 2**20, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(2**44, dtype=torch.uint8, device="cuda")
    assert allocated[0] >= tensor.numel()
    snapshot = pickle.loads(path.read_bytes())  # noqa: S301 — written above
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    (live_block,) = [block for block in blocks if block["size"] == tensor.numel()]
    assert any(frame["name"] == "test_snapshot_shows_live_blocks" for frame in live_block["frames"])
