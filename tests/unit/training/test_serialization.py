"""Serialization: a state is restored exactly, and other objects are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from peftbench.training import serialization

CPU = torch.device("cpu")


def test_load_tree_restores_the_saved_tree(tmp_path: Path) -> None:
    """Types, keys, exact numbers, and empty and scalar tensors are restored."""
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
    loaded = serialization.load_tree(tmp_path / "state", CPU)
    tensors, saved_tensors = loaded.pop("tensors"), tree.pop("tensors")
    assert loaded == tree
    assert isinstance(loaded["pair"][1], tuple)
    assert isinstance(saved_tensors, dict)
    for name, tensor in saved_tensors.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    """A tensor used twice shares memory again after loading; a view of another shape is separate."""
    tensor = torch.arange(1000.0)
    serialization.save_tree({"a": tensor, "b": tensor, "c": tensor[::2], "d": tensor.clone()}, tmp_path / "state")
    loaded = serialization.load_tree(tmp_path / "state", CPU)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert len({loaded[name].data_ptr() for name in "acd"}) == 3
    assert torch.equal(loaded["c"], tensor[::2])
    assert (tmp_path / "state" / serialization.TENSORS_FILE).stat().st_size < 4 * 2600 + 1000


@pytest.mark.parametrize("value", [object(), {1, 2}, {(1, 2): 3}, lambda: None])
def test_other_objects_are_refused(value: object, tmp_path: Path) -> None:
    """Saving an object of any other class fails, so loading never executes code."""
    with pytest.raises(TypeError):
        serialization.save_tree({"a": [value]}, tmp_path / "state")
    suffixes = [path.suffix for path in tmp_path.rglob("*.*")]
    assert set(suffixes) <= {".safetensors", ".json"}
