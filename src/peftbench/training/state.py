"""Capture and restore everything a training run needs to resume bit-identically between two steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftbench.data.collate import FlopUnits, TokenCounts
from peftbench.distributed import deepspeed
from peftbench.optim import OPTIMIZERS
from peftbench.profiler.memory import local_shard

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftbench.training.build import TrainingComponents
    from peftbench.training.loop import TrainProgress

_STATE_CLASSES = {name: module for optimizer in OPTIMIZERS.values() for name, module in optimizer.state_classes.items()}
"""Name -> module of the classes that loading may create in addition to tensors and numbers; it creates no other."""


def capture_state(
    accelerator: Accelerator, training: TrainingComponents, model: nn.Module, progress: TrainProgress
) -> dict[str, Any]:
    """Return this rank's state: trainable weights, optimizer, scheduler, scaler, RNG states and progress."""
    groups = deepspeed.get_param_groups(training.optimizer)
    inner = deepspeed.unwrap_optimizer(training.optimizer)
    return {
        **capture_weights(training, model),
        "optimizer": [
            [_serialize_state(inner.state.get(tensor, {})) for tensor in group["params"]] for group in groups
        ],
        "param_groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
        "lr_scheduler": {
            key: value for key, value in training.lr_scheduler.state_dict().items() if not key.startswith("lr_la")
        },
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "rng_state": _get_rng_state(),
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
    """Restore a captured state in place; pass ``restore_rng_state=False`` for another rank's state.

    Raises:
        ValueError: the state does not fit this model and optimizer.
    """
    load_weights(state, training, model)
    groups = deepspeed.get_param_groups(training.optimizer)
    inner = deepspeed.unwrap_optimizer(training.optimizer)
    for group, states, options in zip(groups, state["optimizer"], state["param_groups"], strict=True):
        group.update(options)
        for tensor, saved in zip(group["params"], states, strict=True):
            if saved:
                inner.state[tensor] = {
                    key: _as_dtensor_like(value, tensor) for key, value in _deserialize_state(saved).items()
                }
    for group, options in zip(inner.param_groups, state["param_groups"], strict=True):
        group.update(options)
    training.lr_scheduler.load_state_dict(training.lr_scheduler.state_dict() | state["lr_scheduler"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if restore_rng_state:
        _set_rng_state(state["rng_state"])
    _load_progress(progress, state["progress"])


def capture_weights(training: TrainingComponents, model: nn.Module) -> dict[str, Any]:
    """Return this rank's trainable weights, the float32 copies that DeepSpeed trains, and the method's state if any."""
    method_state = training.method_hooks.capture_state()
    return {
        "weights": {name: _local_tensor(parameter) for name, parameter in _iter_trained_parameters(training, model)},
        "master_weights": deepspeed.master_weights(training.optimizer),
        **({"method": method_state} if method_state else {}),
    }


@torch.no_grad()
def load_weights(state: dict[str, Any], training: TrainingComponents, model: nn.Module) -> None:
    """Restore captured weights in place.

    Raises:
        ValueError: they do not fit this model and optimizer.
    """
    trained = dict(_iter_trained_parameters(training, model))
    if set(trained) != set(state["weights"]):
        raise ValueError("the checkpoint's trainable parameters differ from this model's")
    for name, parameter in trained.items():
        _copy_into(_local_tensor(parameter), state["weights"][name])
    for master, saved in zip(deepspeed.master_weights(training.optimizer), state["master_weights"], strict=True):
        _copy_into(master, saved)
    if "method" in state:
        training.method_hooks.load_state(state["method"])


def _iter_trained_parameters(training: TrainingComponents, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that the training changes, including those that the optimizer has frozen for some steps."""
    stepped = {id(tensor) for group in deepspeed.get_param_groups(training.optimizer) for tensor in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in stepped:
            yield name, parameter


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the states of all random number generators after the context."""
    state = _get_rng_state()
    try:
        yield
    finally:
        _set_rng_state(state)


def _local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter that this rank stores; ZeRO-3 gathers the full one from these shards."""
    shard: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return local_shard(parameter.data) if shard is None else shard


def _copy_into(tensor: torch.Tensor, source: torch.Tensor) -> None:
    if tensor.shape != source.shape or tensor.dtype != source.dtype:
        raise ValueError(
            f"the checkpoint has a tensor of shape {tuple(source.shape)} {source.dtype} where the model needs "
            f"{tuple(tensor.shape)} {tensor.dtype}"
        )
    tensor.copy_(source)


def _serialize_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return one tensor's optimizer state as plain containers, without custom classes."""
    return {key: _serialize_value(value) for key, value in state.items()}


def _serialize_value(value: object) -> object:
    class_name = type(value).__name__
    if class_name not in _STATE_CLASSES:
        return local_shard(value) if isinstance(value, torch.Tensor) else value
    if isinstance(value, torch.Tensor):  # a quantized state of torchao
        names, (signed, dtype) = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(value, name) for name in names}
        return {class_name: parts, "signed": signed, "dtype": str(dtype).removeprefix("torch.")}
    return {class_name: {key: _serialize_value(below) for key, below in vars(value).items()}}


def _deserialize_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: _deserialize_value(value) if isinstance(value, dict) else value for key, value in state.items()}


def _deserialize_value(value: dict[str, Any]) -> object:
    class_name = next((name for name in value if name in _STATE_CLASSES), None)
    if class_name is None:
        raise ValueError(f"the checkpoint has an optimizer state of an unknown class, with the keys {sorted(value)}")
    state_class = getattr(import_module(_STATE_CLASSES[class_name]), class_name)
    if issubclass(state_class, torch.Tensor):
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['dtype']} is not a torch dtype")
        return state_class.__tensor_unflatten__(value[class_name], (value["signed"], dtype))  # type: ignore[attr-defined]
    state = object.__new__(state_class)
    vars(state).update(value[class_name])
    return state


def _as_dtensor_like(value: object, tensor: torch.Tensor) -> object:
    """Return a state as a DTensor with the sharding of its parameter; scalars and unsharded states stay as they are."""
    if not hasattr(tensor, "to_local") or not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        value, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _get_rng_state() -> dict[str, Any]:
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [
            str(algorithm),
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
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _serialize_progress(progress: TrainProgress) -> dict[str, Any]:
    return {
        "losses": list(progress.losses),
        "stopped_early": progress.stopped_early,
        "skipped_steps": progress.skipped_steps,
        "step_shapes": list(progress.step_shapes),
        "step_max_labeled": list(progress.step_max_labeled),
        "step_token_counts": [asdict(counts) for counts in progress.step_token_counts],
        "step_required": [asdict(units) for units in progress.step_required],
        "step_executed": [asdict(units) for units in progress.step_executed],
        "step_skipped": [asdict(units) for units in progress.step_skipped],
    }


def _load_progress(progress: TrainProgress, saved: dict[str, Any]) -> None:
    progress.losses[:] = saved["losses"]
    progress.stopped_early = saved.get("stopped_early", False)  # a checkpoint of an earlier version lacks it
    progress.skipped_steps = saved["skipped_steps"]
    progress.step_shapes[:] = saved["step_shapes"]
    progress.step_max_labeled[:] = saved.get("step_max_labeled", [])  # checkpoints of earlier versions lack it
    progress.step_token_counts[:] = [TokenCounts(**counts) for counts in saved["step_token_counts"]]
    progress.step_required[:] = [FlopUnits(**units) for units in saved["step_required"]]
    progress.step_executed[:] = [FlopUnits(**units) for units in saved["step_executed"]]
    # Checkpoints of earlier versions have no skipped units: their executed units exclude the skipped work.
    skipped = saved.get("step_skipped", [{}] * len(progress.step_executed))
    progress.step_skipped[:] = [FlopUnits(**units) for units in skipped]
