"""The state of a training between two steps: what must come back for the next step to be the one it would have been."""

from __future__ import annotations

import random
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftbench.data.collate import FlopUnits, TokenCounts
from peftbench.distributed import deepspeed
from peftbench.profiler.memory import local_shard

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftbench.training.build import TrainingComponents
    from peftbench.training.loop import TrainProgress

# What an optimizer's state may hold beside tensors and numbers: by name, so that nothing else is made on reading.
_OPTIM_STATE_8BIT = "OptimState8bit"
_PROJECTOR_MODULES = {
    "GaLoreProjector": "pytorch_optimizer.optimizer.utils.galore",
    "GradientProjector": "apollo_torch.random_projector",
}
"""And where it is."""


def capture_state(
    accelerator: Accelerator, training: TrainingComponents, model: nn.Module, progress: TrainProgress
) -> dict[str, Any]:
    """This process's part of the state: trained weights, optimizer, schedule, scaler, random numbers and counts."""
    groups = deepspeed.get_param_groups(training.optimizer)
    steps = deepspeed.unwrap_optimizer(training.optimizer)
    return {
        "weights": {
            name: _local_tensor(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
        },
        "masters": deepspeed.master_weights(training.optimizer),
        "optimizer": [
            [_serialize_state(steps.state.get(tensor, {})) for tensor in group["params"]] for group in groups
        ],
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
        "schedule": {
            key: value for key, value in training.lr_scheduler.state_dict().items() if not key.startswith("lr_la")
        },
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "random": _get_rng_state(),
        "progress": _serialize_progress(progress),
    }


def load_state(
    state: dict[str, Any],
    accelerator: Accelerator,
    training: TrainingComponents,
    model: nn.Module,
    progress: TrainProgress,
    *,
    restore_rng_state: bool = True,
) -> None:
    """Put a captured state back, in place; ``own_random_state`` is false where it was another process's.

    Raises:
        ValueError: it does not fit this model and optimizer.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(trained) != set(state["weights"]):
        raise ValueError("other weights are trained")
    with torch.no_grad():
        for name, parameter in trained.items():
            _copy_into(_local_tensor(parameter), state["weights"][name])
        for master, kept in zip(deepspeed.master_weights(training.optimizer), state["masters"], strict=True):
            _copy_into(master, kept)
    groups = deepspeed.get_param_groups(training.optimizer)
    steps = deepspeed.unwrap_optimizer(training.optimizer)
    for group, states, knobs in zip(groups, state["optimizer"], state["groups"], strict=True):
        group.update(knobs)
        for tensor, kept in zip(group["params"], states, strict=True):
            if kept:
                steps.state[tensor] = {
                    key: _as_dtensor_like(value, tensor) for key, value in _deserialize_state(kept).items()
                }
    for group, knobs in zip(steps.param_groups, state["groups"], strict=True):
        group.update(knobs)
    training.lr_scheduler.load_state_dict(training.lr_scheduler.state_dict() | state["schedule"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if restore_rng_state:
        _set_rng_state(state["random"])
    _load_progress(progress, state["progress"])


def _local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter for good; ZeRO's stage 3 makes the whole from the parts."""
    part: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return local_shard(parameter.data) if part is None else part


def _copy_into(tensor: torch.Tensor, source: torch.Tensor) -> None:
    if tensor.shape != source.shape or tensor.dtype != source.dtype:
        raise ValueError(f"a tensor of {tuple(source.shape)} {source.dtype} is kept for one of {tuple(tensor.shape)}")
    tensor.copy_(source)


def _serialize_state(state: dict[str, Any]) -> dict[str, Any]:
    """One tensor's optimizer state without classes."""
    return {key: _serialize_value(value) for key, value in state.items()}


def _serialize_value(value: object) -> object:
    if type(value).__name__ == _OPTIM_STATE_8BIT:
        names, (signed, dtype) = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(value, name) for name in names}
        return {_OPTIM_STATE_8BIT: parts, "signed": signed, "dtype": str(dtype).removeprefix("torch.")}
    if isinstance(value, torch.Tensor):
        return local_shard(value)
    if (name := type(value).__name__) in _PROJECTOR_MODULES:
        return {name: {key: _serialize_value(below) for key, below in vars(value).items()}}
    return value


def _deserialize_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: _deserialize_value(value) if isinstance(value, dict) else value for key, value in state.items()}


def _deserialize_value(value: dict[str, Any]) -> object:
    if _OPTIM_STATE_8BIT in value:
        from torchao.optim.subclass_8bit import OptimState8bit

        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['dtype']} is no type of torch")
        return OptimState8bit.__tensor_unflatten__(value[_OPTIM_STATE_8BIT], (value["signed"], dtype))
    ((name, kept),) = value.items()
    kind = getattr(import_module(_PROJECTOR_MODULES[name]), name)
    made = object.__new__(kind)
    vars(made).update(kept)
    return made


def _as_dtensor_like(value: object, tensor: torch.Tensor) -> object:
    """A state as the tensor that it belongs to: a part of a sharded one, where that is one and their shapes agree."""
    if not hasattr(tensor, "to_local") or not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        value, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _get_rng_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state().clone() if torch.cuda.is_available() else None,
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _serialize_progress(progress: TrainProgress) -> dict[str, Any]:
    return {
        "losses": list(progress.losses),
        "skipped": progress.skipped_steps,
        "shapes": list(progress.step_shapes),
        "counts": [asdict(count) for count in progress.step_token_counts],
        "required": [asdict(work) for work in progress.step_required],
        "executed": [asdict(work) for work in progress.step_executed],
    }


def _load_progress(progress: TrainProgress, saved: dict[str, Any]) -> None:
    progress.losses[:] = saved["losses"]
    progress.skipped_steps = saved["skipped"]
    progress.step_shapes[:] = saved["shapes"]
    progress.step_token_counts[:] = [TokenCounts(**count) for count in saved["counts"]]
    progress.step_required[:] = [FlopUnits(**work) for work in saved["required"]]
    progress.step_executed[:] = [FlopUnits(**work) for work in saved["executed"]]
