"""Run one process as rank 0 of several, with torch's fake process group and accelerate on top.

The process is set up like one that a launcher started, except that its device is the meta device and collectives send
nothing. This changes global state of the process, which is restored at the end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import distributed

from peftbench.distributed.accelerator import AcceleratorContext, create_accelerator, resolve_engine
from peftbench.distributed.engines import DDP
from peftbench.errors import EstimateUnavailableError
from peftbench.memory.launch_config import LaunchConfig, suppress_library_output

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

    from peftbench.memory.simulation.device import DeviceEmulation
    from peftbench.memory.simulation.values import FakeScalars
    from peftbench.recipe.schema import Recipe


@contextmanager
def fake_distributed(
    recipe: Recipe, launch_config: LaunchConfig, emulation: DeviceEmulation, fake_scalars: FakeScalars
) -> Iterator[AcceleratorContext]:
    """Yield the accelerator of rank 0 of ``launch_config``, and restore the process's state at the end.

    ``recipe`` sets the batch sizes of a step.

    Raises:
        EngineError: the launcher's config does not select the engine, or sets a key that the recipe owns.
    """
    if distributed.is_initialized():
        raise EstimateUnavailableError(
            "Estimates for several processes cannot run inside a distributed process; run them before the launch"
        )
    with ExitStack() as changes:
        changes.enter_context(suppress_library_output())
        changes.enter_context(launch_config.patch_environ())
        changes.enter_context(patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "meta"}))
        changes.enter_context(_isolate_accelerate_state())
        changes.enter_context(_init_fake_process_group(launch_config.num_processes))
        changes.enter_context(_patch_engines_for_meta(launch_config))
        if launch_config.engine.is_deepspeed:
            from peftbench.memory.simulation.deepspeed_device import use_meta_accelerator

            changes.enter_context(use_meta_accelerator(emulation))
        changes.enter_context(fake_scalars)
        engine, plugin = resolve_engine(recipe, Path(), launch_config.dp_world_size)
        context = create_accelerator(recipe, Path(), engine, plugin, cpu=True)
        # Callers read the reduced value, which a meta tensor does not have.
        changes.enter_context(patch.object(context.accelerator, "reduce", lambda _: torch.zeros(())))
        yield context


@contextmanager
def _isolate_accelerate_state() -> Iterator[None]:
    """Clear accelerate's process-wide state, and restore it at the end."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, saved in zip(states, before, strict=True):
            state.clear()
            state.update(saved)


@contextmanager
def _init_fake_process_group(world_size: int) -> Iterator[None]:
    """Initialize a process group in which this process is rank 0 and no other rank exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with patch.object(sys, "excepthook", sys.excepthook):  # torch wraps it to print the rank
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        try:
            yield
        finally:
            distributed.destroy_process_group()


@contextmanager
def _patch_engines_for_meta(launch_config: LaunchConfig) -> Iterator[None]:
    """Patch checks of torch's engines that read values or reject meta tensors."""
    with ExitStack() as patches:

        def put(target: object, name: str, value: object, **options: Any) -> None:
            patches.enter_context(patch.object(target, name, value, **options))

        if launch_config.engine.is_fsdp:
            from torch.distributed.fsdp import _fully_shard
            from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

            put(FSDPParamGroup, "_validate_no_meta_params", lambda _: None)
            put(_fully_shard._fully_shard, "_get_device_from_mesh", lambda _: torch.device("meta"))
            put(torch, "meta", torch.cpu, create=True)  # it has no streams
            put(torch.Tensor, "data_ptr", _get_storage_id)
        if launch_config.engine == DDP:
            from torch.nn.parallel import DistributedDataParallel
            from torch.nn.parallel import distributed as ddp

            original_init = DistributedDataParallel.__init__

            def init(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
                original_init(self, *args, **kwargs)
                # A lambda, since torch checks the annotations of a hook.
                self.register_comm_hook(None, lambda _, bucket: _all_reduce_bucket(bucket))

            put(ddp, "_verify_param_shape_across_processes", lambda *_, **__: None)
            put(DistributedDataParallel, "__init__", init)
        yield


def _get_storage_id(tensor: torch.Tensor) -> int:
    """Return a unique id per storage: accelerate identifies weights by data_ptr, which is 0 for all meta tensors."""
    return int(tensor.untyped_storage()._cdata)


def _all_reduce_bucket(bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """All-reduce a bucket; DDP's built-in reduction expects results that the fake group does not return."""
    distributed.all_reduce(bucket.buffer())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
