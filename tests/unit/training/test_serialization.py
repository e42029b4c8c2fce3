"""State comes back as it was, and nothing else than state can be written or read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from peftbench.training import serialization

CPU = torch.device("cpu")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Types, keys, numbers to the last bit, empty and scalar tensors."""
    tree = {
        "text": "a",
        3: [1, 2.5, None, True],
        "pair": (1, (2, "b")),
        "empty": {},
        "nothing": [],
        "numbers": [0.1, 1e-300, math.inf, 2**63],
        "tensors": {
            "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
            "none": torch.zeros(0, 3),
            "scalar": torch.tensor(7),
            "bytes": torch.arange(5, dtype=torch.uint8),
        },
    }
    serialization.save_tree(tree, tmp_path / "state")
    found = serialization.load_tree(tmp_path / "state", CPU)
    tensors, kept = found.pop("tensors"), tree.pop("tensors")
    assert found == tree
    assert isinstance(found["pair"][1], tuple)
    assert isinstance(kept, dict)
    for name, tensor in kept.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)


def test_parts_of_one_memory(tmp_path: Path) -> None:
    """A tensor that two share is written once and shared again; a view of another shape is its own."""
    code = torch.arange(1000.0)
    serialization.save_tree({"a": code, "b": code, "c": code[::2], "d": code.clone()}, tmp_path / "state")
    found = serialization.load_tree(tmp_path / "state", CPU)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert len({found[name].data_ptr() for name in "acd"}) == 3
    assert torch.equal(found["c"], code[::2])
    assert (tmp_path / "state" / serialization.TENSORS_FILE).stat().st_size < 4 * 2600 + 1000


@pytest.mark.parametrize("stranger", [object(), {1, 2}, {(1, 2): 3}, lambda: None])
def test_nothing_that_could_be_executed(stranger: object, tmp_path: Path) -> None:
    """An object of a class is refused when it is written, and so never made when it is read."""
    with pytest.raises(TypeError):
        serialization.save_tree({"a": [stranger]}, tmp_path / "state")
    written = [path.suffix for path in tmp_path.rglob("*.*")]
    assert set(written) <= {".safetensors", ".json"}
