"""ENGINES: how weights and states are spread over processes and devices, and which way the launcher asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peftbench.errors import EngineError

OffloadDevice = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class EngineKind:
    """One way of spreading weights, gradients and optimizer states."""

    name: str
    zero_stage: int = 0
    """Stage of DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), 0 for another engine."""
    offload_optimizer: OffloadDevice = "none"
    """Where optimizer states lie, if not on the device."""
    offload_parameters: OffloadDevice = "none"
    """Where weights lie while no layer needs them, if not on the device."""
    is_fsdp: bool = False
    """Whether it is torch's fully_shard."""

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed drives the step; its optimizer then steps within the backward pass."""
        return self.zero_stage > 0

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only a part of the weights between their uses."""
        return self.is_fsdp or self.zero_stage == 3

    @property
    def offloads_to_nvme(self) -> bool:
        """Whether weights or optimizer states lie on a disk."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)


SINGLE, DDP, FSDP2 = EngineKind("single"), EngineKind("ddp"), EngineKind("fsdp2", is_fsdp=True)
ENGINES: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        SINGLE,
        DDP,
        EngineKind("zero1", 1),
        EngineKind("zero2", 2),
        EngineKind("zero2_offload", 2, "cpu"),
        EngineKind("zero3", 3),
        EngineKind("zero3_offload", 3, "cpu", "cpu"),
        EngineKind("zero3_nvme", 3, "nvme", "nvme"),
        FSDP2,
    )
}
"""By name; but for single, there is an accelerate file of that name in accel_configs/."""


def detect_requested_engine(deepspeed_config: Mapping[str, Any] | None) -> EngineKind:
    """The engine that the launcher's environment, or with DeepSpeed its configuration, asks for.

    Raises:
        EngineError: an engine that is not in the table.
    """
    if deepspeed_config is not None:
        zero = deepspeed_config.get("zero_optimization", {})
        asked = EngineKind(
            "",
            int(zero.get("stage", 0)),
            _read_offload_device(zero, "offload_optimizer"),
            _read_offload_device(zero, "offload_param"),
        )
        found = [kind for kind in ENGINES.values() if (kind.is_deepspeed and _has_same_sharding(kind, asked))]
        if not found:
            raise EngineError(
                f"the DeepSpeed file asks for ZeRO stage {asked.zero_stage} with optimizer states on "
                f"{asked.offload_optimizer!r} and weights on {asked.offload_parameters!r}, which is no engine of "
                f"peftbench; use a file of ds_configs/: {', '.join(k.name for k in ENGINES.values() if k.is_deepspeed)}"
            )
        return found[0]
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise EngineError(f"FSDP version {version} was asked for; use fsdp_version: 2, as accel_configs/fsdp2.yaml")
        if os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true":
            raise EngineError("fsdp2 with offload is not run here; use accel_configs/zero3_offload.yaml")
        return FSDP2
    return DDP if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SINGLE


def _read_offload_device(zero: Mapping[str, Any], section: str) -> OffloadDevice:
    place: OffloadDevice = (zero.get(section) or {}).get("device") or "none"
    return place


def _has_same_sharding(kind: EngineKind, requested: EngineKind) -> bool:
    return (kind.zero_stage, kind.offload_optimizer, kind.offload_parameters) == (
        requested.zero_stage,
        requested.offload_optimizer,
        requested.offload_parameters,
    )
