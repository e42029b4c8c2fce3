"""DeepSpeed: writes the recipe's numbers into its config, reads its effective config back, and unwraps its optimizers.

No other module uses DeepSpeed's config keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.distributed import launcher_env
from peftbench.distributed.engines import EngineKind
from peftbench.errors import EngineError, MissingFileError

if TYPE_CHECKING:
    import torch
    from accelerate.utils import DeepSpeedPlugin
    from torch import nn

AUTO = "auto"
_RECIPE_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)
"""Keys whose values the recipe determines."""
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
"""Sections that place state or print; any other could change the computation."""
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


def build_plugin(
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    max_grad_norm: float | None,
    offload_dir: Path,
) -> DeepSpeedPlugin:
    """Build accelerate's plugin from the launcher's DeepSpeed config and the recipe's numbers.

    ``micro_batch_size`` is the largest of a process; DeepSpeed uses it only in its reports. ``offload_dir`` receives
    state that is offloaded to disk.

    Raises:
        MissingFileError, EngineError: the config file does not exist, or sets what the recipe determines.
    """
    config = _read_config()
    from accelerate.utils import DeepSpeedPlugin

    _check_keys(config)
    for key in _RECIPE_KEYS:
        if (value := _get_nested(config, key)) not in (None, AUTO):
            raise EngineError(
                f'the DeepSpeed config sets {key} to {value!r}, which the recipe determines; set it to "auto"'
            )
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = gradient_accumulation_steps
    config["train_batch_size"] = micro_batch_size * gradient_accumulation_steps * world_size
    config["gradient_clipping"] = max_grad_norm or 0.0  # unset, accelerate makes it 1
    for section in ("offload_optimizer", "offload_param"):
        offload = config.get("zero_optimization", {}).get(section)
        if offload and offload.get("nvme_path") == AUTO:  # unset, accelerate makes it a folder "none"
            offload["nvme_path"] = str(offload_dir)
    # Each process loads the full base model, as under every other engine, and is sharded afterwards: weights that are
    # initialized in shards have other values, and methods cannot be applied to them.
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def _check_keys(config: Mapping[str, Any]) -> None:
    zero = config["zero_optimization"]
    _check_types(zero)
    sections = [("", config, _ALLOWED_SECTIONS | set(_RECIPE_KEYS)), ("zero_optimization.", zero, _ALLOWED_ZERO_KEYS)]
    sections += [
        (f"zero_optimization.{section}.", zero.get(section) or {}, _ALLOWED_OFFLOAD_KEYS)
        for section in ("offload_optimizer", "offload_param")
    ]
    for prefix, section, allowed in sections:
        if unknown := sorted(set(section) - allowed):
            raise EngineError(
                f"the DeepSpeed config sets {prefix}{unknown[0]}, which can change the computation that the recipe "
                f"determines; remove it (allowed: {', '.join(sorted(allowed))})"
            )


def _check_types(zero: Mapping[str, Any]) -> None:
    mistake = None
    if zero.get("stage") not in (1, 2, 3):
        mistake = "stage", zero.get("stage"), "1, 2 or 3"
    for section in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(section) or {}, Mapping):
            mistake = section, zero[section], 'a section, e.g. {"device": "cpu"}'
    for key in ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", *(k for k in zero if "stage3_" in k)):
        if key in zero and zero[key] != AUTO and not isinstance(zero[key], (int, float)):
            mistake = key, zero[key], 'a number or "auto"'
    if mistake:
        raise EngineError("the DeepSpeed config sets zero_optimization.{} to {!r}; it must be {}".format(*mistake))


def _read_config() -> dict[str, Any]:
    path = launcher_env.get_deepspeed_config_path()
    if path is None:
        raise EngineError(
            "DeepSpeed was requested without a config file; use an accelerate config that names one (e.g. "
            "accel_configs/zero2.yaml), or --deepspeed_config_file ds_configs/zero2.json"
        )
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingFileError(
            f"DeepSpeed config {path} not found",
            "the path is relative to the current folder; launch from the project's",
        ) from error
    except ValueError as error:
        raise EngineError(f"the DeepSpeed config {path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise EngineError(f"the DeepSpeed config {path} has no section zero_optimization; see ds_configs/zero2.json")
    return config


def _get_nested(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def check_nvme_support() -> None:
    """Check that DeepSpeed can offload to disk.

    Raises:
        EngineError: DeepSpeed's disk access cannot be compiled; DeepSpeed's own error has no remedy.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise EngineError(
            "NVMe offload needs the development files of libaio, which were not found; install them (Debian: "
            "libaio-dev, Red Hat: libaio-devel), or use accel_configs/zero3_offload.yaml"
        )


def restore_hf_loading() -> None:
    """Make transformers load full models, as without DeepSpeed; at stage 3 accelerate makes it load shards."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def read_effective_config(engine: Any) -> dict[str, object]:
    """Return the settings of a started DeepSpeedEngine, with the keys of :func:`build_expected_config`."""
    return {
        "engine": type(engine).__name__,
        "zero_stage": int(engine.zero_optimization_stage()),
        "offload_optimizer": _offload_device_name(engine.zero_offload_optimizer()),
        "offload_parameters": _offload_device_name(engine.zero_offload_param()),
        "max_grad_norm": float(engine.gradient_clipping()) or None,
        "gradient_accumulation_steps": int(engine.gradient_accumulation_steps()),
        "micro_batch_size": int(engine.train_micro_batch_size_per_gpu()),
        "weights_dtype": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        "num_processes": int(engine.dp_world_size),
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
    """Return the settings that :func:`read_effective_config` must return."""
    return {
        "engine": "DeepSpeedEngine",
        "zero_stage": engine.zero_stage,
        "offload_optimizer": engine.offload_optimizer,
        "offload_parameters": engine.offload_parameters,
        "max_grad_norm": max_grad_norm,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "micro_batch_size": micro_batch_size,
        "weights_dtype": weights_dtype,
        "num_processes": world_size,
    }


def _offload_device_name(offload: Any) -> str:
    device = getattr(offload, "device", None)
    return str(getattr(device, "value", device) or "none")


def unwrap_chain(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those it wraps: accelerate's wrapper, ZeRO's wrapper, and the one that steps."""
    yield optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
        yield optimizer


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the innermost optimizer, which steps."""
    return list(unwrap_chain(optimizer))[-1]


def master_weights(optimizer: Any) -> list[torch.Tensor]:
    """Return this process's float32 copies of trained weights, which ZeRO's optimizer steps; empty on other engines."""
    for layer in unwrap_chain(optimizer):
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(layer, name):
                return list(getattr(layer, name))
    return []


def get_param_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Return the parameter groups with the tensors that the innermost optimizer steps.

    ZeRO stage 3 puts them into the optimizer's own groups only during a step.
    """
    *wrappers, innermost = unwrap_chain(optimizer)
    groups = [dict(group) for group in innermost.param_groups]
    for layer in wrappers:
        if hasattr(layer, "fp32_partitioned_groups_flat"):
            for group in groups:
                group["params"] = []
            for index, tensor in enumerate(layer.fp32_partitioned_groups_flat):
                groups[layer.sub_group_to_group_id[index]]["params"].append(tensor)
    return groups


def release_prefetched_weights(engine: nn.Module) -> None:
    """Free the full parameters that ZeRO-3 has prefetched for a next module; do nothing on other engines."""
    release = getattr(getattr(engine, "optimizer", None), "empty_partition_cache", None)
    if release is not None:
        release()


def gather_full_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """Gather a full parameter from all processes to the CPU: the float32 copy if it is trained. A collective."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    trained = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if trained is not None:
        full: torch.Tensor = trained.detach().cpu().reshape(get_full_shape(parameter))
        return full
    with zero.GatheredParameters([parameter]):
        gathered: torch.Tensor = parameter.detach().cpu().clone()
    return gathered


def get_full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the full parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)  # type: ignore[no-any-return]


def count_local_bytes(parameter: nn.Parameter) -> int:
    """Count the bytes of a parameter that this process holds between uses."""
    shard = getattr(parameter, "ds_tensor", None)
    local = parameter if shard is None or parameter.numel() else shard
    return int(local.numel() * local.element_size())
