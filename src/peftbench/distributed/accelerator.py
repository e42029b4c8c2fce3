"""Binds a recipe to the machine it runs on, through accelerate, and checks that what started is what was asked for."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from peftbench.common.dtypes import get_autocast_dtype
from peftbench.data.batches import compute_micro_batching
from peftbench.distributed import deepspeed
from peftbench.distributed.compatibility import (
    ACTIVATION_OFFLOAD,
    CHECKPOINTING,
    COMPILE,
    FEATURE_CACHE,
    LIGER,
    MICRO_BATCH_TOKENS,
    QUANTIZATION,
    Combination,
    check,
)
from peftbench.distributed.engines import DDP, SINGLE, EngineKind, detect_requested_engine
from peftbench.errors import EngineError, PrecisionError
from peftbench.record import Device
from peftbench.run_dir.layout import RunDir

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin

    from peftbench.recipe.schema import Precision, Recipe

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class AcceleratorContext:
    """An accelerator, and the engine that it drives."""

    accelerator: Accelerator
    engine: EngineKind
    precision: Precision = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """Arithmetic in the recipe's precision, for a forward pass that the engine does not put into it itself."""
        dtype = get_autocast_dtype(self.precision)
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=dtype is not None)

    @property
    def engine_autocasts(self) -> bool:
        """Whether accelerate puts a prepared model's forward pass into the recipe's precision.

        Under DeepSpeed and fully_shard it would round the weights instead, which is the recipe's to say.
        """
        return not (self.engine.is_deepspeed or self.engine.is_fsdp)


def build_accelerator(recipe: Recipe, run_dir: Path) -> AcceleratorContext:
    """The accelerator for this recipe: its numbers, and the launcher's engine, processes and device.

    Raises:
        PrecisionError: the device does not have the recipe's precision.
        EngineError: what started is not what the recipe and the launcher asked for.
    """
    cpu = runs_on_cpu()
    _check_precision(recipe.train.precision, cpu)
    _check_trackers(recipe.trackers)
    processes = launched_world_size()
    accumulation, _ = compute_micro_batching(
        recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, processes
    )
    _check_gradient_accumulation(accumulation)
    engine, plugin = resolve_engine(recipe, run_dir, processes)
    _check_launch(cpu, engine)
    if recipe.method.is_trainable:
        check(build_combination(recipe, engine), "cpu" if cpu else "cuda")
    if recipe.train.feature_cache is not None:
        _check_single_node(processes)
    if engine.offloads_to_nvme:
        deepspeed.check_nvme_support()
    bound = create_accelerator(recipe, run_dir, engine, plugin, cpu=cpu)
    _verify_process_group(bound.accelerator, engine)
    return bound


def resolve_engine(recipe: Recipe, run_dir: Path, world_size: int) -> tuple[EngineKind, DeepSpeedPlugin | None]:
    """What the launcher's environment asks for, with accelerate's plugin where it is DeepSpeed.

    Raises:
        EngineError, MissingFileError: it is no engine of the table, or a file sets what the recipe owns.
    """
    _check_recipe_owned_settings()
    plugin = None
    if deepspeed.is_requested():
        accumulation, micro_batch = compute_micro_batching(
            recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, world_size
        )
        plugin = deepspeed.build_plugin(
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            world_size=world_size,
            max_grad_norm=recipe.train.max_grad_norm,
            offload_dir=RunDir(run_dir).offload_dir,
        )
    return detect_requested_engine(plugin.deepspeed_config if plugin else None), plugin


def create_accelerator(
    recipe: Recipe, run_dir: Path, engine: EngineKind, plugin: DeepSpeedPlugin | None, *, cpu: bool
) -> AcceleratorContext:
    """The accelerator that drives ``engine``, in the processes that are there."""
    processes = launched_world_size()
    accumulation, _ = compute_micro_batching(
        recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, processes
    )
    if cpu and engine.is_fsdp:
        _enable_fsdp_on_cpu()
    accelerator = Accelerator(
        # With cpu=True accelerate replaces DeepSpeed by DDP and FSDP by nothing, without a word.
        cpu=cpu and engine in (SINGLE, DDP),
        mixed_precision="no" if plugin else _ACCELERATE_PRECISION[recipe.train.precision],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        deepspeed_plugins=plugin,
        fsdp_plugin=_build_fsdp_plugin() if engine.is_fsdp else None,
        log_with=list(recipe.trackers) or None,
        project_dir=str(run_dir),
        # Without it, processes on CPU train apart from each other with no error.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if cpu and (processes > 1 or plugin) else None,
    )
    if plugin:
        deepspeed.restore_hf_loading()
    return AcceleratorContext(accelerator, engine, recipe.train.precision)


def build_combination(recipe: Recipe, engine: EngineKind) -> Combination:
    """What the table of what runs on what is asked."""
    asked = {
        QUANTIZATION: recipe.model.quantization is not None,
        CHECKPOINTING: recipe.checkpoint.interval is not None,
        ACTIVATION_OFFLOAD: recipe.train.activation_offloading,
        MICRO_BATCH_TOKENS: recipe.train.micro_batch_tokens is not None,
        COMPILE: recipe.train.compile,
        LIGER: recipe.train.cross_entropy == "liger",
        FEATURE_CACHE: recipe.train.feature_cache is not None,
    }
    extras = frozenset(extra for extra, wanted in asked.items() if wanted)
    return Combination(recipe.method.kind, engine.name, recipe.optimizer.kind, recipe.train.precision, extras)


def _build_fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """As the launcher's file has it, with weights gathered as they are: accelerate would round them all to bf16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def _enable_fsdp_on_cpu() -> None:
    """Have accelerate run fully_shard on CPU, where it knows of FSDP on accelerators alone; torch runs it there too."""
    state = PartialState(cpu=True, backend="gloo")
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def collect_environment_warnings(accelerator: Accelerator) -> list[str]:
    """What a reader must know of where a run happened."""
    # A script that is run by itself has asked for nothing.
    launched = not {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"}.isdisjoint(os.environ)
    if accelerator.device.type == "cpu" and launched and not _is_cpu_requested():
        return ["no GPU was found; it ran on CPU"]
    return []


def runs_on_cpu() -> bool:
    """Whether a run is on the CPU: where there is no GPU, or the launcher says so."""
    return not torch.cuda.is_available() or _is_cpu_requested()


def _is_cpu_requested() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}


def launched_world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_trackers(requested: tuple[str, ...]) -> None:
    from accelerate.tracking import get_available_trackers

    there = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    if missing := [name for name in requested if name not in there]:  # accelerate would go on without
        raise EngineError(
            f"the trackers {', '.join(missing)} are not installed; install what is missing, or leave them out"
        )


def _check_gradient_accumulation(gradient_accumulation_steps: int) -> None:
    told = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if told not in {"1", str(gradient_accumulation_steps)}:
        raise EngineError(
            f"accelerate was told to accumulate {told} times, and the recipe owns that: set train.global_batch_size and "
            "train.micro_batch_size, and unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )


def _check_single_node(world_size: int) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if here != world_size:
        raise EngineError(
            f"train.feature_cache is a file that all {world_size} processes map, and {here} of them are on this machine; "
            "launch them on one, or set train.feature_cache=null"
        )


def _check_recipe_owned_settings() -> None:
    """Refuse what an accelerate file may say that changes what is computed, or how much memory it takes."""
    asked = {
        "fsdp_activation_checkpointing": os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false"),
        "dynamo_config": os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no"),
        "parallelism_config": os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false"),
    }
    for key, value in asked.items():
        if value.lower() not in {"false", "no", ""}:
            instead = {"fsdp_activation_checkpointing": "set train.gradient_checkpointing=true in the recipe"}
            raise EngineError(
                f"the accelerate file asks for {key} ({value}), which is no engine of peftbench; take it out"
                + (f" and {instead[key]}" if key in instead else "")
            )


def _check_launch(cpu: bool, engine: EngineKind) -> None:
    # Where an accelerate file asks for several processes in a way that its launcher cannot start (MULTI_CPU without
    # mpirun, say), the launcher starts one, which has an address to meet the others at and no rank.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    if launched and "MASTER_ADDR" in os.environ and not _is_set_in_parent_process("MASTER_ADDR"):
        raise EngineError(
            "accelerate was asked for several processes and started one; give its config file distributed_type: "
            "MULTI_GPU, as accel_configs/cpu2.yaml and ddp.yaml do"
        )
    if engine not in (SINGLE, DDP):
        return  # DeepSpeed and FSDP run on CPU from the same files, and the record says so
    hidden = set(os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")) <= {"", "-1"}
    if cpu and launched_world_size() > 1 and not hidden and not _is_cpu_requested():
        raise EngineError(
            f"{launched_world_size()} processes were started for GPUs and there is no GPU; "
            "for several processes on CPU use accel_configs/cpu2.yaml"
        )


def _is_set_in_parent_process(variable: str) -> bool:
    """Whether the process that started this one was given the variable, so that it did not set it itself."""
    try:
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # not Linux: no accusation without evidence
        return True
    return any(entry.startswith(f"{variable}=".encode()) for entry in given.split(b"\0"))


def _check_precision(precision: str, cpu: bool) -> None:
    if precision == "fp16" and cpu:
        raise PrecisionError("train.precision=fp16 needs a GPU and this run is on CPU; use bf16 or fp32")
    if precision == "bf16" and not cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise PrecisionError(f"train.precision=bf16 is not there on {name}, which would emulate it; use fp16 or fp32")


def _verify_process_group(accelerator: Accelerator, engine: EngineKind) -> None:
    asked = launched_world_size()
    if accelerator.num_processes != asked:
        raise EngineError(
            f"the launcher started {asked} processes and {accelerator.num_processes} formed one world "
            f"({accelerator.distributed_type}); check the accelerate config file"
        )
    started = accelerator.distributed_type
    if engine.is_deepspeed != (started == DistributedType.DEEPSPEED) or engine.is_fsdp != accelerator.is_fsdp2:
        raise EngineError(f"{engine.name} was asked for and accelerate started {started}; check its config file")
    # A world that only claims to be one would add up to something else.
    if asked > 1 and int(accelerator.reduce(torch.ones(1, device=accelerator.device)).item()) != asked:
        raise EngineError(
            f"{asked} processes were started but do not talk to each other; check the accelerate config file"
        )


def verify_engine_config(
    recipe: Recipe,
    context: AcceleratorContext,
    model: object,
    optimizer: object,
    unwrapped_optimizer: torch.optim.Optimizer,
) -> None:
    """Compare what the engine made of the recipe with the recipe, before the first step.

    Raises:
        EngineError: any difference, each named.
    """
    accelerator, engine = context.accelerator, context.engine
    processes = accelerator.num_processes
    accumulation, micro_batch = compute_micro_batching(
        recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, processes
    )
    if recipe.train.micro_batch_tokens is not None:  # it was found out from the examples, and told the accelerator
        accumulation = accelerator.gradient_accumulation_steps
    asked: dict[str, object] = {"accumulation": accumulation, "optimizer": _qualified_name(unwrapped_optimizer)}
    found: dict[str, object] = {
        "accumulation": accelerator.gradient_accumulation_steps,
        "optimizer": _qualified_name(deepspeed.unwrap_optimizer(optimizer)),
    }
    if engine.is_deepspeed:
        asked |= deepspeed.build_expected_config(
            engine,
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            world_size=processes,
            max_grad_norm=recipe.train.max_grad_norm,
            weights_dtype="fp32",
        )
        found |= deepspeed.read_effective_config(model)
    else:
        asked |= {"engine": {"fsdp2": "FSDPModule", "ddp": "DistributedDataParallel"}.get(engine.name, "no wrapper")}
        asked |= {"precision": _ACCELERATE_PRECISION[recipe.train.precision]}
        found |= {"engine": _wrapper_name(model), "precision": str(accelerator.mixed_precision)}
    unlike = [f"{key} {found[key]!r} instead of {asked[key]!r}" for key in asked if found[key] != asked[key]]
    if unlike:
        raise EngineError(f"{engine.name} did not start as the recipe asks: {', '.join(unlike)}")


def _qualified_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _wrapper_name(model: object) -> str:
    from torch._dynamo import OptimizedModule
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    for kind in (FSDPModule, DistributedDataParallel, OptimizedModule):
        if isinstance(model, kind):
            return kind.__name__
    return "no wrapper"


def describe_device(accelerator: Accelerator) -> Device:
    """What the run is on, for the record."""
    processes = accelerator.num_processes
    if accelerator.device.type == "cuda":
        properties = torch.cuda.get_device_properties(accelerator.device)
        return Device(type="cuda", name=properties.name, num_processes=processes, memory_bytes=properties.total_memory)
    return Device(type=accelerator.device.type, name=_cpu_name(), num_processes=processes)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")
