"""Optimizer states in a checkpoint: classes other than tensors come from the optimizers' attributes alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from peftbench.data.collate import FlopUnits
from peftbench.optim import OPTIMIZERS, Optimizer
from peftbench.training.loop import TrainProgress
from peftbench.training.state import _deserialize_value, _load_progress, _serialize_progress, _serialize_value

STATE_CLASSES = [item for optimizer in OPTIMIZERS.values() for item in optimizer.state_classes.items()]


@pytest.mark.parametrize(("name", "module"), STATE_CLASSES)
def test_state_classes_exist(name: str, module: str) -> None:
    """Each library defines the class in the module that the optimizer's attribute names."""
    pytest.importorskip(module.partition(".")[0])
    state_class = getattr(import_module(module), name)
    assert (state_class.__name__, state_class.__module__) == (name, module)


@pytest.mark.parametrize("class_name", ["Popen", "OrderedDict", "Optimizer"])
def test_other_class_is_refused(class_name: str) -> None:
    """Loading creates no object of a class that no optimizer has."""
    with pytest.raises(ValueError, match=f"unknown class, with the keys \\['{class_name}'\\]"):
        _deserialize_value({class_name: {"args": "ls"}})


def test_8bit_state_is_restored() -> None:
    """Codes, scales, table, sign and dtype of torchao's tensor class are equal after a round trip."""
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    state = torchao.OptimState8bit.zeros((2, 256), signed=False)
    state.codes.copy_(torch.arange(512).view(2, 256) % 256)
    saved = _serialize_value(state)
    assert isinstance(saved, dict)
    restored: Any = _deserialize_value(saved)
    assert type(restored) is torchao.OptimState8bit
    assert (restored.signed, restored.dtype, restored.shape) == (False, state.dtype, state.shape)
    for name in ("codes", "scale", "qmap"):
        assert torch.equal(getattr(restored, name), getattr(state, name))


def test_projector_is_restored() -> None:
    """An object's attributes are equal after a round trip, and its constructor does not run."""
    apollo = pytest.importorskip("apollo_torch.random_projector")
    projector = apollo.GradientProjector(4, update_proj_gap=3)
    saved = _serialize_value(projector)
    assert isinstance(saved, dict)
    restored = _deserialize_value(saved)
    assert type(restored) is apollo.GradientProjector
    assert vars(restored) == vars(projector)


def test_states_of_tensors_need_no_class() -> None:
    """Most optimizers name no class; tensors and numbers are saved as they are."""
    assert Optimizer.state_classes == {}
    assert _serialize_value(3) == 3
    tensor = torch.ones(2)
    assert torch.equal(_serialize_value(tensor), tensor)  # type: ignore[arg-type]


def test_work_of_each_step_is_restored() -> None:
    """A checkpoint of an earlier version has no skipped work: its executed work excludes it."""
    executed, skipped = [FlopUnits(9, 81), FlopUnits(5, 25)], [FlopUnits(), FlopUnits(5, 25)]
    saved = _serialize_progress(TrainProgress(losses=[2.0, 1.0], step_executed=executed, step_skipped=skipped))
    restored = TrainProgress()
    _load_progress(restored, saved)
    assert (restored.step_executed, restored.step_skipped) == (executed, skipped)
    del saved["step_skipped"]
    _load_progress(restored, saved)
    assert (restored.step_executed, restored.step_skipped) == (executed, [FlopUnits(), FlopUnits()])
