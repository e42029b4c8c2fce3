"""One process that takes itself for the first of several: torch's fake process group, and accelerate over it.

Everything is as a launcher's process has it, but that the device is torch's meta device and that collectives send
nothing. All of that is state of the process, and is put back at the end.
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
    """The accelerator of ``world``'s first process, with what it changes in this process taken back at the end.

    ``recipe`` says the numbers of a step.

    Raises:
        EngineError: the launcher's files do not ask for the engine, or set what the recipe owns.
    """
    if distributed.is_initialized():
        raise EstimateUnavailableError(
            "a plan of several processes cannot be made in one of several; make it before them"
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
        engine, plugin = resolve_engine(recipe, Path(), launch_config.num_processes)
        bound = create_accelerator(recipe, Path(), engine, plugin, cpu=True)
        # A number, where the meta device has none.
        changes.enter_context(patch.object(bound.accelerator, "reduce", lambda _: torch.zeros(())))
        yield bound


@contextmanager
def _isolate_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its state for the process; that of here is another's."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)


@contextmanager
def _init_fake_process_group(world_size: int) -> Iterator[None]:
    """A process group of which this process is the first and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with patch.object(sys, "excepthook", sys.excepthook):  # which torch wraps, to say the rank
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        try:
            yield
        finally:
            distributed.destroy_process_group()


@contextmanager
def _patch_engines_for_meta(launch_config: LaunchConfig) -> Iterator[None]:
    """Have torch's engines go on where they would look at values, or refuse weights that have none."""
    with ExitStack() as patches:

        def put(place: object, name: str, value: object, **how: Any) -> None:
            patches.enter_context(patch.object(place, name, value, **how))

        if launch_config.engine.is_fsdp:
            from torch.distributed.fsdp import _fully_shard
            from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

            put(FSDPParamGroup, "_validate_no_meta_params", lambda _: None)
            put(_fully_shard._fully_shard, "_get_device_from_mesh", lambda _: torch.device("meta"))
            put(torch, "meta", torch.cpu, create=True)  # whose streams are none
            put(torch.Tensor, "data_ptr", _get_storage_id)
        if launch_config.engine == DDP:
            from torch.nn.parallel import DistributedDataParallel
            from torch.nn.parallel import distributed as ddp

            made = DistributedDataParallel.__init__

            def init(self: DistributedDataParallel, *given: Any, **named: Any) -> None:
                made(self, *given, **named)
                self.register_comm_hook(None, lambda _, bucket: _all_reduce_bucket(bucket))  # torch reads annotations

            put(ddp, "_verify_param_shape_across_processes", lambda *_, **__: None)
            put(DistributedDataParallel, "__init__", init)
        yield


def _get_storage_id(tensor: torch.Tensor) -> int:
    """One for each storage, by which accelerate knows a weight again; on the meta device all are 0."""
    return int(tensor.untyped_storage()._cdata)


def _all_reduce_bucket(bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP's own way of sending comes to: the fake group's answers are not what it expects."""
    distributed.all_reduce(bucket.buffer())
    sent: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    sent.set_result(bucket.buffer())
    return sent
