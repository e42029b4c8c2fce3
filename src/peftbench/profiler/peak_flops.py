"""Peak FLOP/s of a device, from its data sheet and from a measured matrix product."""

from __future__ import annotations

import time

import torch

from peftbench.common.dtypes import TORCH_DTYPES

PEAK_FLOPS: dict[str, dict[str, float]] = {
    # Dense, with accumulation in fp32. fp32 is without tensor cores, since torch disables TF32 by default.
    "Tesla T4": {"fp32": 8.1e12, "fp16": 65e12},
    "Tesla V100-SXM2": {"fp32": 15.7e12, "fp16": 125e12},
    "Tesla V100-PCIE": {"fp32": 14e12, "fp16": 112e12},
    "NVIDIA A10": {"fp32": 31.2e12, "fp16": 125e12, "bf16": 125e12},
    "NVIDIA A30": {"fp32": 10.3e12, "fp16": 165e12, "bf16": 165e12},
    "NVIDIA A40": {"fp32": 37.4e12, "fp16": 149.7e12, "bf16": 149.7e12},
    "NVIDIA L4": {"fp32": 30.3e12, "fp16": 121e12, "bf16": 121e12},
    "NVIDIA L40S": {"fp32": 91.6e12, "fp16": 362e12, "bf16": 362e12},
    "NVIDIA RTX A6000": {"fp32": 38.7e12, "fp16": 154.8e12, "bf16": 154.8e12},
    "NVIDIA GeForce RTX 3090": {"fp32": 35.6e12, "fp16": 71e12, "bf16": 71e12},
    "NVIDIA GeForce RTX 4080": {"fp32": 48.7e12, "fp16": 97.5e12, "bf16": 97.5e12},
    "NVIDIA GeForce RTX 5090": {"fp32": 104.8e12, "fp16": 209.5e12, "bf16": 209.5e12},
    "NVIDIA GeForce RTX 4090": {"fp32": 82.6e12, "fp16": 165.2e12, "bf16": 165.2e12},
    "NVIDIA H100 PCIe": {"fp32": 51.2e12, "fp16": 756e12, "bf16": 756e12},
    "NVIDIA A100": {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12},
    "NVIDIA A100 80GB PCIe": {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12},
    "NVIDIA H100 NVL": {"fp32": 60e12, "fp16": 835.5e12, "bf16": 835.5e12},
    "NVIDIA GH200 480GB": {"fp32": 67e12, "fp16": 989.4e12, "bf16": 989.4e12},
    "NVIDIA H100 80GB HBM3": {"fp32": 66.9e12, "fp16": 989.4e12, "bf16": 989.4e12},
    "NVIDIA B200": {"fp16": 2250e12, "bf16": 2250e12},
    "NVIDIA H200": {"fp32": 66.9e12, "fp16": 989.4e12, "bf16": 989.4e12},
}
"""FLOP/s by torch's device name, which may continue with a hyphen.

Sources, all NVIDIA's: data sheets of T4, V100 (2020), A10, A30, A40, A100 (2021), L4, L40S, RTX A6000 (half of the
value with sparsity), H200, H100 NVL, GH200 (2024) and B200 (half of the values with sparsity; fp32 is given differently
in two documents); the architecture white papers of H100 (SXM5 and PCIe), GA102 (RTX 3090), Ada (RTX 4080, 4090) and
Blackwell (RTX 5090; fp16 with accumulation in fp32).
"""

_MATRIX_SIZES = {"cuda": 8192, "cpu": 1024}
_MEASUREMENT_SECONDS = 0.1


def get_peak_flops(device_name: str, precision: str) -> float | None:
    """Return the data sheet's FLOP/s of the device, None if it is not in the table."""
    if " MIG " in device_name:  # a slice of a device
        return None
    matches = [peaks for name, peaks in PEAK_FLOPS.items() if device_name == name or device_name.startswith(f"{name}-")]
    return matches[0].get(precision) if matches else None


def measure_matmul_flops(device: torch.device, precision: str) -> float | None:
    """Measure the FLOP/s of square matrix products on ``device``: the best within a tenth of a second.

    Return None if the device has too little free memory.
    """
    size = _MATRIX_SIZES.get(device.type, 1024)
    try:
        return _measure_best(
            device, *(torch.rand((size, size), device=device).to(TORCH_DTYPES[precision]) for _ in range(3))
        )
    except RuntimeError:  # out of memory; the run itself succeeded and left no room
        return None


def _measure_best(device: torch.device, left: torch.Tensor, right: torch.Tensor, output: torch.Tensor) -> float:
    best, deadline = 0.0, time.perf_counter() + _MEASUREMENT_SECONDS
    torch.mm(left, right, out=output)  # warm-up: selects the kernel
    while True:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right, out=output)
        _synchronize(device)
        end = time.perf_counter()
        best = max(best, 2 * len(left) ** 3 / (end - start))
        if end > deadline:
            return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
