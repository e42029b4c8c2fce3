"""What NVIDIA's driver tells of a GPU beside torch: the memory of a whole process, and energy.

Figures of the NVML API reference, read through NVIDIA's own binding (nvidia-ml-py). What the driver does not tell is
None: in a container it often cannot name the process that asks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

try:
    import pynvml
except ImportError:  # it comes with peftbench, and what it would tell is unknown without it
    pynvml = None


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver knows it."""

    handle: Any

    @classmethod
    def from_device(cls, device: torch.device) -> Gpu | None:
        """The GPU that torch calls ``device``, None where there is no driver or it does not know it."""
        if pynvml is None:
            return None
        try:
            pynvml.nvmlInit()
            # By its name for life: the driver's order of devices need not be torch's.
            uuid = torch.cuda.get_device_properties(device).uuid
            return cls(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except (pynvml.NVMLError, RuntimeError, AttributeError):
            return None

    def read_process_bytes(self) -> int | None:
        """Memory that this process uses on the GPU: torch's, the context's and the libraries'."""
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        except pynvml.NVMLError:
            return None
        mine = [process for process in processes if process.pid == os.getpid()]
        # In a container the driver gives the host's numbers of processes; one that is alone needs no number.
        found = mine or (processes if len(processes) == 1 else [])
        return int(found[0].usedGpuMemory) if found and found[0].usedGpuMemory is not None else None

    def read_joules(self) -> float | None:
        """Energy of the whole board since the driver was loaded (Volta and newer)."""
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except pynvml.NVMLError:
            return None
