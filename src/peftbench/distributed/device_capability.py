"""The native arithmetic of a device, on which the precision and the attention implementation of ``auto`` depend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftbench.distributed import launcher_env

_CPU_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Names of torch.cpu.get_capabilities for x86-64 (first two) and ARM64."""


@dataclass(frozen=True)
class DeviceCapability:
    """Native arithmetic of one type of device."""

    device_type: Literal["cuda", "cpu"]
    compute_capability: tuple[int, int] | None = None
    """CUDA compute capability, e.g. (8, 0); None on CPU."""
    has_bf16: bool = False
    """True if the device multiplies bf16 natively: Ampere and newer, or a CPU with bf16 instructions."""
    has_flash_attention: bool = False
    """True if the package flash-attn is installed for this device."""
    is_planned: bool = False
    """True for the target of a memory estimate, False for the device of a run."""
    is_assumed: bool = False
    """True if an estimate names no device, so that one with bf16 is assumed."""

    @classmethod
    def from_compute_capability(
        cls,
        compute_capability: tuple[int, int],
        *,
        has_flash_attention: bool = False,
        is_planned: bool = False,
        is_assumed: bool = False,
    ) -> DeviceCapability:
        """Return the capability of a CUDA device."""
        has_bf16 = compute_capability >= (8, 0)
        return cls("cuda", compute_capability, has_bf16, has_flash_attention, is_planned, is_assumed)


def detect_device_capability(*, use_cpu: bool | None = None) -> DeviceCapability:
    """Return the capability of this process's device; no CUDA context is created.

    ``use_cpu`` selects the CPU; None: as the launcher requests.
    """
    import torch

    if launcher_env.runs_on_cpu() if use_cpu is None else use_cpu or not torch.cuda.is_available():
        return DeviceCapability("cpu", has_bf16=_has_bf16_instructions())
    from transformers.utils.import_utils import is_flash_attn_2_available

    device = launcher_env.get_local_rank() % torch.cuda.device_count()  # the process has not selected its device yet
    return DeviceCapability.from_compute_capability(
        torch.cuda.get_device_capability(device), has_flash_attention=is_flash_attn_2_available()
    )


def _has_bf16_instructions() -> bool:
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _CPU_BF16_INSTRUCTIONS)
