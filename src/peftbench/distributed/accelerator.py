"""Builds the accelerator of a run, and verifies that the engine started with the recipe's settings."""

from __future__ import annotations

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
from peftbench.distributed import collectives, deepspeed, launcher_env, preflight
from peftbench.distributed.compatibility import (
    ACTIVATION_OFFLOAD,
    CHECKPOINTING,
    COMPILE,
    FEATURE_CACHE,
    FROZEN_DTYPES,
    GRADIENT_READER,
    LIGER,
    MICRO_BATCH_TOKENS,
    NO_LORA,
    QUANTIZATION,
    TRIED_METHOD,
    Combination,
    check,
)
from peftbench.distributed.engines import DDP, SINGLE, EngineKind, detect_requested_engine
from peftbench.errors import EngineError
from peftbench.record import Device
from peftbench.run_dir.layout import RunDir

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin

    from peftbench.recipe.schema import Precision, Recipe

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class AcceleratorContext:
    """An accelerator and the engine that it drives."""

    accelerator: Accelerator
    engine: EngineKind
    precision: Precision = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """Return an autocast context in the recipe's precision, for forward passes that the engine does not
        autocast.
        """
        dtype = get_autocast_dtype(self.precision)
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=dtype is not None)

    @property
    def engine_autocasts(self) -> bool:
        """True if accelerate autocasts the forward pass of a prepared model.

        Under DeepSpeed and fully_shard it would round the weights instead, which the recipe keeps in float32.
        """
        return not (self.engine.is_deepspeed or self.engine.is_fsdp)

    @property
    def dp_rank(self) -> int:
        """Index of this process among those that divide the data."""
        return collectives.get_dp_rank(self.accelerator)

    @property
    def dp_world_size(self) -> int:
        """Number of processes that divide the data."""
        return collectives.get_dp_world_size(self.accelerator)


def build_accelerator(recipe: Recipe, run_dir: Path) -> AcceleratorContext:
    """Build the accelerator for this recipe and the launcher's engine, processes and device.

    Raises:
        PrecisionError: the device does not have the recipe's precision.
        CombinationError: the recipe does not run on the engine.
        EngineError: the launch contradicts the recipe, or something else started than was requested.
    """
    cpu = launcher_env.runs_on_cpu()
    preflight.check_precision(recipe.train.resolved_precision, cpu)
    preflight.check_trackers(recipe.trackers)
    world_size = launcher_env.get_world_size()
    accumulation_steps, _ = _compute_micro_batching(recipe, world_size)
    preflight.check_gradient_accumulation(accumulation_steps)
    engine, plugin = resolve_engine(recipe, run_dir, world_size)
    preflight.check_launch(cpu, engine)
    if recipe.method.is_trainable:
        check(build_combination(recipe, engine), "cpu" if cpu else "cuda")
    if recipe.train.feature_cache is not None:
        preflight.check_single_node()
    if engine.offloads_to_nvme:
        deepspeed.check_nvme_support()
    context = create_accelerator(recipe, run_dir, engine, plugin, cpu=cpu)
    _verify_process_group(context.accelerator, engine)
    return context


def resolve_engine(recipe: Recipe, run_dir: Path, dp_world_size: int) -> tuple[EngineKind, DeepSpeedPlugin | None]:
    """Return the engine that the launcher requests, and accelerate's plugin if the engine is DeepSpeed.

    Raises:
        EngineError, MissingFileError: the engine is not supported, or a config file sets what the recipe determines.
    """
    preflight.check_recipe_owned_settings()
    plugin = None
    if launcher_env.is_deepspeed_requested():
        accumulation_steps, micro_batch_size = _compute_micro_batching(recipe, dp_world_size)
        plugin = deepspeed.build_plugin(
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation_steps,
            world_size=dp_world_size,
            max_grad_norm=recipe.train.max_grad_norm,
            offload_dir=RunDir(run_dir).offload_dir,
        )
    return detect_requested_engine(plugin.deepspeed_config if plugin else None), plugin


def create_accelerator(
    recipe: Recipe, run_dir: Path, engine: EngineKind, plugin: DeepSpeedPlugin | None, *, cpu: bool
) -> AcceleratorContext:
    """Create the accelerator that drives ``engine`` in the launched processes."""
    world_size = launcher_env.get_world_size()
    accumulation_steps, _ = _compute_micro_batching(recipe, world_size)
    if cpu and engine.is_fsdp:
        _enable_fsdp_on_cpu()
    accelerator = Accelerator(
        # With cpu=True accelerate silently replaces DeepSpeed by DDP, and drops FSDP.
        cpu=cpu and engine in (SINGLE, DDP),
        mixed_precision="no" if plugin else _ACCELERATE_PRECISION[recipe.train.resolved_precision],
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulation_steps, sync_with_dataloader=False
        ),
        deepspeed_plugins=plugin,
        fsdp_plugin=_build_fsdp_plugin() if engine.is_fsdp else None,
        project_dir=str(run_dir),
        # Without a backend, processes on CPU train independently of each other, with no error.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if cpu and (world_size > 1 or plugin) else None,
    )
    if plugin:
        deepspeed.restore_hf_loading()
    return AcceleratorContext(accelerator, engine, recipe.train.resolved_precision)


def build_combination(recipe: Recipe, engine: EngineKind) -> Combination:
    """Return the recipe's point of the compatibility table on this engine."""
    is_used = {
        QUANTIZATION: recipe.model.quantization is not None,
        CHECKPOINTING: recipe.checkpoint.interval is not None,
        ACTIVATION_OFFLOAD: recipe.train.activation_offloading,
        MICRO_BATCH_TOKENS: recipe.train.micro_batch_tokens is not None,
        COMPILE: recipe.train.compile,
        LIGER: recipe.train.cross_entropy == "liger",
        FEATURE_CACHE: recipe.train.feature_cache is not None,
        TRIED_METHOD: recipe.method.needs_trial,
        NO_LORA: recipe.method.needs_trial and not recipe.method.adds_lora,
        GRADIENT_READER: recipe.method.reads_gradients,
    }
    features = {feature for feature, used in is_used.items() if used}
    if recipe.method.freezes_weights and (frozen := FROZEN_DTYPES.get(recipe.model.dtype)):
        features.add(frozen)
    return Combination(
        recipe.method.family,
        engine.name,
        recipe.optimizer.kind,
        recipe.train.resolved_precision,
        frozenset(features),
        recipe.method.kind,
    )


def _compute_micro_batching(recipe: Recipe, dp_world_size: int) -> tuple[int, int]:
    """Return the gradient accumulation steps, and the micro-batch size of a process."""
    return compute_micro_batching(recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, dp_world_size)


def _build_fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """Return the plugin for the launcher's settings, without accelerate's policy, which would round weights to bf16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def _enable_fsdp_on_cpu() -> None:
    """Make accelerate run fully_shard on CPU, which torch supports and accelerate does not."""
    state = PartialState(cpu=True, backend="gloo")
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def collect_environment_warnings(accelerator: Accelerator) -> list[str]:
    """Return notes for the record on the device of the run."""
    # A script that was started without a launcher requested no device.
    launched = launcher_env.is_launched_by_accelerate()
    if accelerator.device.type == "cpu" and launched and not launcher_env.is_cpu_requested():
        return ["No GPU was found; the run used the CPU."]
    return []


def _verify_process_group(accelerator: Accelerator, engine: EngineKind) -> None:
    launched = launcher_env.get_world_size()
    if accelerator.num_processes != launched:
        raise EngineError(
            f"the launcher started {launched} processes, and {accelerator.num_processes} joined the process group "
            f"({accelerator.distributed_type}); check the accelerate config"
        )
    started = accelerator.distributed_type
    if engine.is_deepspeed != (started == DistributedType.DEEPSPEED) or engine.is_fsdp != accelerator.is_fsdp2:
        raise EngineError(f"{engine.name} was requested, and accelerate started {started}; check the accelerate config")
    # A group may exist without connecting its processes.
    if launched > 1 and int(accelerator.reduce(torch.ones(1, device=accelerator.device)).item()) != launched:
        raise EngineError(
            f"the launcher started {launched} processes, and a test all-reduce did not reach all of them; check the "
            "accelerate config"
        )


def verify_equal_recipes(accelerator: Accelerator, recipe: Recipe) -> None:
    """Check that all ranks resolved ``auto`` to the same values. Collective.

    Raises:
        EngineError: they did not, since their machines differ.
    """
    values = collectives.all_gather_objects(
        accelerator, (recipe.train.precision, recipe.model.attention, recipe.train.micro_batch_size)
    )
    if differing := sorted({str(value) for value in values if value != values[0]}):
        raise EngineError(
            f"the processes resolved train.precision, model.attention and train.micro_batch_size differently: "
            f"{values[0]} and {', '.join(differing)}; set these keys in the recipe instead of auto"
        )


def verify_engine_config(
    recipe: Recipe,
    context: AcceleratorContext,
    model: object,
    optimizer: object,
    unwrapped_optimizer: torch.optim.Optimizer,
) -> None:
    """Compare the settings of the started engine with the recipe, before the first step.

    Raises:
        EngineError: settings differ; the message names each with both values.
    """
    accelerator, engine = context.accelerator, context.engine
    accumulation_steps, micro_batch_size = _compute_micro_batching(recipe, context.dp_world_size)
    if recipe.train.micro_batch_tokens is not None:  # depends on the lengths of the examples, and is set already
        accumulation_steps = accelerator.gradient_accumulation_steps
    expected: dict[str, object] = {
        "gradient_accumulation_steps": accumulation_steps,
        "optimizer": _qualified_name(unwrapped_optimizer),
    }
    effective: dict[str, object] = {
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "optimizer": _qualified_name(deepspeed.unwrap_optimizer(optimizer)),
    }
    if engine.is_deepspeed:
        expected |= deepspeed.build_expected_config(
            engine,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation_steps,
            world_size=context.dp_world_size,
            max_grad_norm=recipe.train.max_grad_norm,
            weights_dtype="fp32",
        )
        effective |= deepspeed.read_effective_config(model)
    else:
        expected |= {"engine": {"fsdp2": "FSDPModule", "ddp": "DistributedDataParallel"}.get(engine.name, "no wrapper")}
        expected |= {"precision": _ACCELERATE_PRECISION[recipe.train.resolved_precision]}
        effective |= {"engine": _wrapper_name(model), "precision": str(accelerator.mixed_precision)}
    differences = [
        f"{key} {effective[key]!r} instead of {expected[key]!r}" for key in expected if effective[key] != expected[key]
    ]
    if differences:
        raise EngineError(f"{engine.name} did not start with the recipe's settings: {', '.join(differences)}")


def _qualified_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _wrapper_name(model: object) -> str:
    from torch._dynamo import OptimizedModule
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    for wrapper in (FSDPModule, DistributedDataParallel, OptimizedModule):
        if isinstance(model, wrapper):
            return wrapper.__name__
    return "no wrapper"


def describe_device(accelerator: Accelerator) -> Device:
    """Return the device of the run, for the record."""
    num_processes = accelerator.num_processes
    if accelerator.device.type == "cuda":
        properties = torch.cuda.get_device_properties(accelerator.device)
        return Device(
            type="cuda", name=properties.name, num_processes=num_processes, memory_bytes=properties.total_memory
        )
    return Device(type=accelerator.device.type, name=read_cpu_name(), num_processes=num_processes)


def read_cpu_name() -> str:
    """Return the processor's name, "unknown" if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
