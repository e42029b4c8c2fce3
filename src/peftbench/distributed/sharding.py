"""Gathers sharded weights for code that needs full ones, and counts the bytes that each process holds."""

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
    """Gather the parameters outside of layers (embeddings, soft tokens) for code that bypasses the model's forward.

    torch's fully_shard gathers them when the outermost module is called, which generation does not do if a method wraps
    the base model; layers have hooks of their own. Does nothing on other engines.
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


@contextmanager
def full_weights(engine: EngineKind, model: nn.Module, *, on_this_rank: bool) -> Iterator[None]:
    """Within the context, give ``model`` all its weights in CPU memory on each process with ``on_this_rank``.

    Use it to save the model. Trained weights are float32, as the optimizer holds them. Forward passes within the
    context have no hooks of the engine, which would look for shards. Afterwards the model has its shards and hooks
    again. Entering is collective.
    """
    if not (engine.is_deepspeed or engine.is_fsdp):
        yield
        return
    reshard(model)
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))  # a tied parameter has several
    gathered: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in owners:
        weight = _gather_full_tensor(engine, parameter)
        if on_this_rank:
            gathered[parameter] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
    hooks = _remove_forward_hooks(model)
    try:
        for parameter, full in gathered.items():
            for module, name in owners[parameter]:
                module._parameters[name] = full
        yield
    finally:
        for parameter in gathered:
            for module, name in owners[parameter]:
                module._parameters[name] = parameter
        for hook_dict, removed in hooks:
            hook_dict.update(removed)


def _remove_forward_hooks(model: nn.Module) -> list[tuple[dict[int, object], dict[int, object]]]:
    """Remove the forward hooks of all modules; return each module's dicts of hooks, with what they had."""
    removed = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if hooks:
                removed.append((hooks, dict(hooks)))
                hooks.clear()
    return removed  # type: ignore[return-value]


def reshard(model: nn.Module) -> None:
    """Free the full parameters that fully_shard still holds after a forward pass; other engines hold none."""
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
    """Return the bytes of tensors, or of their shards, that this process keeps between steps.

    None if states are on disk, whose sizes DeepSpeed does not report.
    """
    if engine.offloads_to_nvme:
        return None
    reshard(model)
    master_weights = deepspeed.master_weights(optimizer)
    innermost = deepspeed.unwrap_optimizer(optimizer)
    states = [
        local_shard(tensor) for state in innermost.state.values() for tensor in iter_tensors(state.values())
    ] + master_weights
    groups = deepspeed.get_param_groups(optimizer)
    expected = optimizer_config.state_bytes(
        [{**group, "params": [local_shard(p) for p in group["params"]]} for group in groups]
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(local_shard(parameter).numel() * parameter.element_size() for parameter in trained)
    if master_weights:  # from stage 2 on gradients are sharded as the states are
        full = sum(deepspeed.get_full_shape(p).numel() * p.element_size() for p in trained)
        shard = sum(master.numel() for master in master_weights) * trained[0].element_size()
        gradients = shard if engine.zero_stage > 1 else full
    weights, offloaded_weights = _count_weight_bytes(engine, model, device_type)
    offloaded_gradients = gradients if engine.offload_optimizer != "none" and device_type != "cpu" else 0
    # Paged states count as the GPU's, although its driver may move them.
    on_device = [state for state in states if state.device.type == device_type or getattr(state, "is_paged", False)]
    offloaded_states = count_storage_bytes(states) - count_storage_bytes(on_device)
    return StateBytes(
        weights=weights,
        gradients=gradients - offloaded_gradients,
        optimizer=count_storage_bytes(on_device),
        cpu_offloaded=offloaded_weights + offloaded_gradients + offloaded_states,
        expected_optimizer=None if expected is None else expected + count_storage_bytes(master_weights),
    )


def _count_weight_bytes(engine: EngineKind, model: nn.Module, device_type: str) -> tuple[int, int]:
    """Return the bytes of weights and buffers on the device, and those offloaded to the CPU."""
    if engine.zero_stage == 3:
        buffers = count_storage_bytes(list(model.buffers()))
        weights = sum(map(deepspeed.count_local_bytes, model.parameters()))
        is_offloaded = engine.offload_parameters != "none" and device_type != "cpu"
        return (buffers, weights) if is_offloaded else (buffers + weights, 0)
    tensors = [local_shard(tensor) for tensor in (*model.parameters(), *model.buffers())]
    # The scales and the code table by which quantized weights are dequantized.
    tensors += iter_tensors(getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return count_storage_bytes(tensors), 0
