"""Read from NVML what torch does not report: the GPU memory of the whole process, and energy.

Uses NVIDIA's own binding (nvidia-ml-py). A value that the driver does not report is None: in a container it often
cannot identify the calling process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

try:
    import pynvml
except ImportError:  # a dependency; without it, all values are None
    pynvml = None


@dataclass(frozen=True)
class Gpu:
    """One GPU, by its NVML handle."""

    handle: Any

    @classmethod
    def from_device(cls, device: torch.device) -> Gpu | None:
        """Return the GPU that torch calls ``device``, None without a driver or if the driver does not list it."""
        if pynvml is None:
            return None
        try:
            pynvml.nvmlInit()
            # By UUID: the driver's order of devices can differ from torch's.
            uuid = torch.cuda.get_device_properties(device).uuid
            return cls(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except (pynvml.NVMLError, RuntimeError, AttributeError):
            return None

    def read_process_bytes(self) -> int | None:
        """Return the GPU memory of this process: torch's, the context's and the libraries'."""
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        except pynvml.NVMLError:
            return None
        own = [process for process in processes if process.pid == os.getpid()]
        # In a container the driver reports host process ids. A single process must be this one.
        matches = own or (processes if len(processes) == 1 else [])
        return int(matches[0].usedGpuMemory) if matches and matches[0].usedGpuMemory is not None else None

    def read_joules(self) -> float | None:
        """Return the joules of the whole board since the driver was loaded (Volta and newer)."""
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except pynvml.NVMLError:
            return None
