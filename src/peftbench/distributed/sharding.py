"""Weights of which each process holds a part: made whole where something needs them whole, and counted as they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftbench.distributed import deepspeed
from peftbench.profiler.memory import count_storage_bytes, iter_tensors, local_shard
from peftbench.record import StateBytes

if TYPE_CHECKING:
    from peftbench.distributed.engines import EngineKind
    from peftbench.optim import Optimizer


@contextmanager
def unshard_root(model: nn.Module) -> Iterator[None]:
    """Hold whole what belongs to no layer (embeddings, soft tokens), for code that goes past the model's own forward.

    torch's fully_shard gathers it when the outermost module is called, which generation does not do where a method has
    wrapped the base; layers are gathered by hooks of their own. Under other engines there is nothing to do.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def gather_full_model(engine: EngineKind, prepared_model: nn.Module, model: nn.Module, *, on_this_rank: bool) -> None:
    """Make every weight of ``model`` whole again on the CPU of the processes where ``here``, for saving.

    ``started`` is what the engine made of it, and ends with this.

    What was trained comes in float32, as the optimizer has it. Each process must come here; the model is not to be
    trained afterwards.
    """
    if not (engine.is_deepspeed or engine.is_fsdp):
        return
    _reshard(model)
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))  # a tied one has several
    for parameter, holders in places.items():
        weight = _gather_full_tensor(engine, parameter)
        if on_this_rank:
            made = nn.Parameter(weight, requires_grad=parameter.requires_grad)
            for module, name in holders:
                module._parameters[name] = made
    if engine.is_deepspeed:
        prepared_model.destroy()  # type: ignore[operator]  # or its hooks would look for parts


def _reshard(model: nn.Module) -> None:
    """Let go of what fully_shard holds whole since the last forward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _gather_full_tensor(engine: EngineKind, parameter: nn.Parameter) -> torch.Tensor:
    if engine.is_deepspeed:
        return deepspeed.gather_full_parameter(parameter)
    return parameter.full_tensor().cpu()  # type: ignore[attr-defined,no-any-return]


def state_bytes(
    engine: EngineKind,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    optimizer_config: Optimizer,
    device_type: str,
) -> StateBytes | None:
    """What this process keeps from step to step, by the sizes of its tensors, where it holds parts by theirs.

    ``device`` is the kind of device it runs on. None where states lie on a disk, of which DeepSpeed does not tell.
    """
    if engine.offloads_to_nvme:
        return None
    _reshard(model)
    masters = deepspeed.master_weights(optimizer)
    steps = deepspeed.unwrap_optimizer(optimizer)
    states = [
        local_shard(tensor) for state in steps.state.values() for tensor in iter_tensors(state.values())
    ] + masters
    groups = deepspeed.get_param_groups(optimizer)
    given = optimizer_config.state_bytes(
        [{**group, "params": [local_shard(p) for p in group["params"]]} for group in groups]
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(local_shard(parameter).numel() * parameter.element_size() for parameter in trained)
    if masters:  # from stage 2 on gradients are shared out as the states are
        whole = sum(deepspeed.get_full_shape(p).numel() * p.element_size() for p in trained)
        part = sum(master.numel() for master in masters) * trained[0].element_size()
        gradients = part if engine.zero_stage > 1 else whole
    weights, weights_away = _count_weight_bytes(engine, model, device_type)
    gradients_away = gradients if engine.offload_optimizer != "none" and device_type != "cpu" else 0
    # Paged states are the GPU's, which its driver may move.
    here = [state for state in states if state.device.type == device_type or getattr(state, "is_paged", False)]
    away = count_storage_bytes(states) - count_storage_bytes(here)
    return StateBytes(
        weights=weights,
        gradients=gradients - gradients_away,
        optimizer=count_storage_bytes(here),
        cpu_offloaded=weights_away + gradients_away + away,
        expected_optimizer=None if given is None else given + count_storage_bytes(masters),
    )


def _count_weight_bytes(engine: EngineKind, model: nn.Module, device_type: str) -> tuple[int, int]:
    """Bytes of weights and buffers on the device, and elsewhere."""
    if engine.zero_stage == 3:
        here = count_storage_bytes(list(model.buffers()))
        parts = sum(map(deepspeed.count_local_bytes, model.parameters()))
        return (here, parts) if engine.offload_parameters != "none" and device_type != "cpu" else (here + parts, 0)
    held = [local_shard(tensor) for tensor in (*model.parameters(), *model.buffers())]
    # What turns a quantised weight back into numbers: scales, and a table.
    held += iter_tensors(getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return count_storage_bytes(held), 0
