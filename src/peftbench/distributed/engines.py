"""ENGINES: how weights, gradients and optimizer states are sharded and offloaded; and the launcher's choice of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peftbench.distributed import launcher_env
from peftbench.errors import EngineError

OffloadDevice = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class EngineKind:
    """One way to shard and offload weights, gradients and optimizer states."""

    name: str
    zero_stage: int = 0
    """Stage of DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054); 0 for other engines."""
    offload_optimizer: OffloadDevice = "none"
    """Device of offloaded optimizer states."""
    offload_parameters: OffloadDevice = "none"
    """Device of offloaded weights between uses."""
    is_fsdp: bool = False
    """True for torch's fully_shard."""
    fallbacks: tuple[str, ...] = ()
    """Most similar engines, which a refusal suggests first."""

    @property
    def is_deepspeed(self) -> bool:
        """True if DeepSpeed drives the step; its optimizer then steps within the backward pass."""
        return self.zero_stage > 0

    @property
    def shards_weights(self) -> bool:
        """True if a process holds only a shard of the weights between uses."""
        return self.is_fsdp or self.zero_stage == 3

    @property
    def offloads_to_nvme(self) -> bool:
        """True if weights or optimizer states are kept on disk."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)


SINGLE, DDP = EngineKind("single"), EngineKind("ddp")
FSDP2 = EngineKind("fsdp2", is_fsdp=True, fallbacks=("zero3",))
ENGINES: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        SINGLE,
        DDP,
        EngineKind("zero1", 1),
        EngineKind("zero2", 2),
        EngineKind("zero2_offload", 2, "cpu", fallbacks=("zero3_offload", "zero2")),
        EngineKind("zero3", 3, fallbacks=("fsdp2",)),
        EngineKind("zero3_offload", 3, "cpu", "cpu", fallbacks=("zero2_offload",)),
        EngineKind("zero3_nvme", 3, "nvme", "nvme", fallbacks=("zero3_offload",)),
        FSDP2,
    )
}
"""Engines by name. accel_configs/ has an accelerate config of the same name for each except single."""


def detect_requested_engine(deepspeed_config: Mapping[str, Any] | None) -> EngineKind:
    """Return the engine that the launcher requests, by its DeepSpeed config or else its environment.

    Raises:
        EngineError: the requested engine is not in ENGINES.
    """
    if deepspeed_config is not None:
        zero = deepspeed_config.get("zero_optimization", {})
        requested = EngineKind(
            "",
            int(zero.get("stage", 0)),
            _read_offload_device(zero, "offload_optimizer"),
            _read_offload_device(zero, "offload_param"),
        )
        engines = [kind for kind in ENGINES.values() if kind.is_deepspeed]
        for engine in engines:
            if _has_same_sharding(engine, requested):
                return engine
        raise EngineError(
            f"the DeepSpeed config sets ZeRO stage {requested.zero_stage} with optimizer states on "
            f"{requested.offload_optimizer!r} and weights on {requested.offload_parameters!r}, which peftbench does "
            f"not support; use one of ds_configs/: {', '.join(engine.name for engine in engines)}"
        )
    if launcher_env.is_fsdp_requested():
        if (version := launcher_env.get_fsdp_version()) != "2":
            raise EngineError(
                f"the accelerate config sets fsdp_version: {version}, which peftbench does not support; set "
                "fsdp_version: 2, as in accel_configs/fsdp2.yaml"
            )
        if launcher_env.is_fsdp_offload_requested():
            raise EngineError("peftbench does not support fsdp2 with offload; use accel_configs/zero3_offload.yaml")
        return FSDP2
    return DDP if launcher_env.get_world_size() > 1 else SINGLE


def _read_offload_device(zero: Mapping[str, Any], section: str) -> OffloadDevice:
    device: OffloadDevice = (zero.get(section) or {}).get("device") or "none"
    return device


def _has_same_sharding(kind: EngineKind, requested: EngineKind) -> bool:
    return (kind.zero_stage, kind.offload_optimizer, kind.offload_parameters) == (
        requested.zero_stage,
        requested.offload_optimizer,
        requested.offload_parameters,
    )
