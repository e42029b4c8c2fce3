"""Checks of a launch before any process joins a group: what the recipe, the launcher and the machine contradict."""

from __future__ import annotations

import torch

from peftbench.distributed import launcher_env
from peftbench.distributed.engines import DDP, SINGLE, EngineKind
from peftbench.errors import EngineError, PrecisionError


def check_trackers(requested: tuple[str, ...]) -> None:
    """Refuse trackers that are not installed; accelerate would skip them with a warning.

    Raises:
        EngineError: a requested tracker is not installed.
    """
    from accelerate.tracking import get_available_trackers

    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    if missing := [name for name in requested if name not in available]:
        raise EngineError(f"trackers not installed: {', '.join(missing)}; install them or remove them from trackers")


def check_gradient_accumulation(gradient_accumulation_steps: int) -> None:
    """Refuse another number of accumulation steps in the accelerate config, which would scale every gradient again.

    Raises:
        EngineError: the accelerate config sets another number.
    """
    launched = launcher_env.get_launched_accumulation_steps()
    if launched not in {"1", str(gradient_accumulation_steps)}:
        raise EngineError(
            f"the accelerate config sets {launched} gradient accumulation steps, which the recipe determines: set "
            "train.global_batch_size and train.micro_batch_size, and unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )


def check_single_node() -> None:
    """Refuse a feature cache for processes on several machines, since all of them map one file.

    Raises:
        EngineError: the processes are on several machines.
    """
    world_size, local_world_size = launcher_env.get_world_size(), launcher_env.get_local_world_size()
    if local_world_size != world_size:
        raise EngineError(
            f"train.feature_cache needs all {world_size} processes on one machine, and {local_world_size} of them are "
            "on this one; launch on one machine, or set train.feature_cache=null"
        )


def check_recipe_owned_settings() -> None:
    """Refuse settings of an accelerate config that change the computation or its memory.

    Raises:
        EngineError: the config has such a setting.
    """
    replacements = {"fsdp_activation_checkpointing": "set train.gradient_checkpointing=true in the recipe"}
    for key, value in launcher_env.get_unsupported_accelerate_settings().items():
        if value.lower() not in {"false", "no", ""}:
            raise EngineError(
                f"the accelerate config sets {key} ({value}), which peftbench does not support; remove it"
                + (f" and {replacements[key]}" if key in replacements else "")
            )


def check_launch(cpu: bool, engine: EngineKind) -> None:
    """Refuse a launch that started other processes, or on another device, than its config requests.

    Raises:
        EngineError: the launcher started one of several processes, or processes for GPUs on a machine without one.
    """
    if launcher_env.has_lost_workers():
        raise EngineError(
            "the accelerate config requests several processes and the launcher started one; set distributed_type: "
            "MULTI_GPU, as in accel_configs/cpu2.yaml and ddp.yaml"
        )
    if engine not in (SINGLE, DDP):
        return  # DeepSpeed and FSDP run on CPU with the same config files, and the record names the device
    world_size = launcher_env.get_world_size()
    if cpu and world_size > 1 and not launcher_env.is_every_gpu_hidden() and not launcher_env.is_cpu_requested():
        raise EngineError(
            f"the launcher started {world_size} processes for GPUs, and this machine has no GPU; for several processes "
            "on CPU use accel_configs/cpu2.yaml"
        )


def check_precision(precision: str, cpu: bool) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        PrecisionError: fp16 on CPU, or bf16 on a GPU that would emulate it.
    """
    if precision == "fp16" and cpu:
        raise PrecisionError("train.precision=fp16 needs a GPU, and this run is on CPU; use bf16 or fp32")
    if precision == "bf16" and not cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise PrecisionError(
            f"train.precision=bf16 is not supported by {name}, which would emulate it; use fp16 or fp32"
        )
