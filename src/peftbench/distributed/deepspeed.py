"""The only file that knows DeepSpeed's keys: a recipe's numbers are written in, and what came of them is read back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.distributed.engines import EngineKind
from peftbench.errors import EngineError, MissingFileError

if TYPE_CHECKING:
    import torch
    from accelerate.utils import DeepSpeedPlugin
    from torch import nn

AUTO = "auto"
_CONFIG_FILE_ENV = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_RECIPE_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)
"""Keys whose values the recipe owns."""
_ALLOWED_SECTIONS = frozenset(
    {
        "zero_optimization",
        "zero_force_ds_cpu_optimizer",
        "zero_allow_untested_optimizer",
        "aio",
        "bf16",
        "fp16",
        "steps_per_print",
        "wall_clock_breakdown",
        "dump_state",
        "comms_logger",
        "memory_breakdown",
    }
)
"""Sections that say where state lies, or what is printed; any other could change what is computed."""
_ALLOWED_ZERO_KEYS = frozenset(
    {
        "stage",
        "overlap_comm",
        "contiguous_gradients",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "allgather_partitions",
        "reduce_scatter",
        "round_robin_gradients",
        "offload_optimizer",
        "offload_param",
        "sub_group_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_gather_16bit_weights_on_model_save",
        "memory_efficient_linear",
    }
)
_ALLOWED_OFFLOAD_KEYS = frozenset(
    {"device", "nvme_path", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "fast_init"}
)


def is_requested() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def build_plugin(
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    max_grad_norm: float | None,
    offload_dir: Path,
) -> DeepSpeedPlugin:
    """Accelerate's plugin for the launcher's DeepSpeed file, with the recipe's numbers in it.

    ``micro_batch`` is the largest of a process; DeepSpeed itself only reports by it. ``scratch`` is where states go
    that are offloaded to a disk.

    Raises:
        MissingFileError, EngineError: the file is not there, or sets what the recipe owns.
    """
    config = _read_config()
    from accelerate.utils import DeepSpeedPlugin

    _check_keys(config)
    for key in _RECIPE_KEYS:
        if (found := _get_nested(config, key)) not in (None, AUTO):
            raise EngineError(f'the DeepSpeed file sets {key} to {found!r}, which is the recipe\'s; write "auto" there')
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = gradient_accumulation_steps
    config["train_batch_size"] = micro_batch_size * gradient_accumulation_steps * world_size
    config["gradient_clipping"] = max_grad_norm or 0.0  # left alone, accelerate makes it 1
    for part in ("offload_optimizer", "offload_param"):
        offload = config.get("zero_optimization", {}).get(part)
        if offload and offload.get("nvme_path") == AUTO:  # left alone, accelerate makes it a folder "none"
            offload["nvme_path"] = str(offload_dir)
    # Each process loads the base whole, as under every other engine, and gives its part away afterwards: weights that
    # are drawn in parts are other weights, and methods could not be applied to them.
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def _check_keys(config: Mapping[str, Any]) -> None:
    zero = config["zero_optimization"]
    _check_types(zero)
    parts = [("", config, _ALLOWED_SECTIONS | set(_RECIPE_KEYS)), ("zero_optimization.", zero, _ALLOWED_ZERO_KEYS)]
    parts += [
        (f"zero_optimization.{part}.", zero.get(part) or {}, _ALLOWED_OFFLOAD_KEYS)
        for part in ("offload_optimizer", "offload_param")
    ]
    for place, found, known in parts:
        if other := sorted(set(found) - known):
            raise EngineError(
                f"the DeepSpeed file has {place}{other[0]}, which can change what is computed and is the recipe's to "
                f"say; take it out (a file may have: {', '.join(sorted(known))})"
            )


def _check_types(zero: Mapping[str, Any]) -> None:
    wrong = None
    if zero.get("stage") not in (1, 2, 3):
        wrong = "stage", zero.get("stage"), "1, 2 or 3"
    for part in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(part) or {}, Mapping):
            wrong = part, zero[part], 'a section, as {"device": "cpu"}'
    for key in ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", *(k for k in zero if "stage3_" in k)):
        if key in zero and zero[key] != AUTO and not isinstance(zero[key], (int, float)):
            wrong = key, zero[key], 'a number or "auto"'
    if wrong:
        raise EngineError("the DeepSpeed file sets zero_optimization.{} to {!r}; it must be {}".format(*wrong))


def _read_config() -> dict[str, Any]:
    named = os.environ.get(_CONFIG_FILE_ENV)
    if not named:
        raise EngineError(
            "DeepSpeed was asked for without a file; use accel_configs/zero2.yaml or another that names one, or "
            "--deepspeed_config_file ds_configs/zero2.json"
        )
    try:
        config = json.loads(Path(named).read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingFileError(
            f"there is no DeepSpeed file {named}", "its path is read from the folder you are in: run from the project's"
        ) from error
    except ValueError as error:
        raise EngineError(f"the DeepSpeed file {named} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise EngineError(f"the DeepSpeed file {named} has no section zero_optimization; ds_configs/zero2.json has one")
    return config


def _get_nested(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def check_nvme_support() -> None:
    """Whether states can be put on a disk.

    Raises:
        EngineError: what DeepSpeed's access to disks is compiled with is not there; its own error names no remedy.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise EngineError(
            "DeepSpeed reads and writes disks through libaio, whose development files are not here; install them "
            "(Debian: libaio-dev, Red Hat: libaio-devel), or use accel_configs/zero3_offload.yaml"
        )


def restore_hf_loading() -> None:
    """Let transformers load models as it does without DeepSpeed; accelerate tells it otherwise at stage 3."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def read_effective_config(engine: Any) -> dict[str, object]:
    """What a started DeepSpeedEngine says of itself, in the recipe's words."""
    return {
        "engine": type(engine).__name__,
        "zero_stage": int(engine.zero_optimization_stage()),
        "offload_optimizer": _offload_device_name(engine.zero_offload_optimizer()),
        "offload_parameters": _offload_device_name(engine.zero_offload_param()),
        "max_grad_norm": float(engine.gradient_clipping()) or None,
        "accumulation": int(engine.gradient_accumulation_steps()),
        "micro_batch_size": int(engine.train_micro_batch_size_per_gpu()),
        "weights": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        "processes": int(engine.dp_world_size),
    }


def build_expected_config(
    engine: EngineKind,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    max_grad_norm: float | None,
    weights_dtype: str,
) -> dict[str, object]:
    """What :func:`effective` must say."""
    return {
        "engine": "DeepSpeedEngine",
        "zero_stage": engine.zero_stage,
        "offload_optimizer": engine.offload_optimizer,
        "offload_parameters": engine.offload_parameters,
        "max_grad_norm": max_grad_norm,
        "accumulation": gradient_accumulation_steps,
        "micro_batch_size": micro_batch_size,
        "weights": weights_dtype,
        "processes": world_size,
    }


def _offload_device_name(offload: Any) -> str:
    device = getattr(offload, "device", None)
    return str(getattr(device, "value", device) or "none")


def unwrap_chain(optimizer: Any) -> Iterator[Any]:
    """An optimizer and what it wraps, from accelerate's wrapper by ZeRO's to the one that steps."""
    yield optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
        yield optimizer


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the innermost optimizer, the one that steps."""
    *_, inner = unwrap_chain(optimizer)
    return inner


def master_weights(optimizer: Any) -> list[torch.Tensor]:
    """This process's copies in float32 of what is trained, which ZeRO's optimizer steps; none under other engines."""
    for layer in unwrap_chain(optimizer):
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(layer, name):
                return list(getattr(layer, name))
    return []


def get_param_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Parameter groups with the tensors that the innermost optimizer steps.

    ZeRO's stage 3 puts them into its groups for the time of a step alone.
    """
    *outer, steps = unwrap_chain(optimizer)
    groups = [dict(group) for group in steps.param_groups]
    for layer in outer:
        if hasattr(layer, "fp32_partitioned_groups_flat"):
            for group in groups:
                group["params"] = []
            for index, tensor in enumerate(layer.fp32_partitioned_groups_flat):
                groups[layer.sub_group_to_group_id[index]]["params"].append(tensor)
    return groups


def gather_full_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter on the CPU, put together from all processes, of which each must come here: the copy in float32 where
    it is trained.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    trained = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if trained is not None:
        made: torch.Tensor = trained.detach().cpu().reshape(get_full_shape(parameter))
        return made
    with zero.GatheredParameters([parameter]):
        gathered: torch.Tensor = parameter.detach().cpu().clone()
    return gathered


def get_full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)  # type: ignore[no-any-return]


def count_local_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter that this process holds between its uses."""
    part = getattr(parameter, "ds_tensor", None)
    held = parameter if part is None or parameter.numel() else part
    return int(held.numel() * held.element_size())
