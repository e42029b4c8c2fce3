"""Peak FLOP/s of a device, from its data sheet and measured."""

from __future__ import annotations

import time

import pytest
import torch

from peftbench.profiler.peak_flops import PEAK_FLOPS, get_peak_flops, measure_matmul_flops


def test_peak_flops_of_known_devices() -> None:
    """Torch's device name may be longer than the name in the table."""
    assert get_peak_flops("NVIDIA A100-SXM4-40GB", "bf16") == 312e12
    assert get_peak_flops("NVIDIA H200", "fp32") == 66.9e12
    assert get_peak_flops("Tesla T4", "fp16") == 65e12
    assert get_peak_flops("NVIDIA A100 80GB PCIe", "bf16") == get_peak_flops("NVIDIA A100-PCIE-40GB", "bf16") == 312e12


UNKNOWN = [
    ("AMD EPYC", "fp32"),
    ("Tesla T4", "bf16"),
    ("", "fp32"),
    ("NVIDIA H200 NVL", "bf16"),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
]


@pytest.mark.parametrize(("name", "precision"), UNKNOWN)
def test_unknown_device_is_none(name: str, precision: str) -> None:
    """An unknown device or an unsupported precision gives None."""
    assert get_peak_flops(name, precision) is None


def test_no_name_is_prefix_of_another() -> None:
    """Each device matches one row."""
    assert len(PEAK_FLOPS) >= 5
    assert not [(a, b) for a in PEAK_FLOPS for b in PEAK_FLOPS if a != b and a.startswith(f"{b}-")]
    assert get_peak_flops("NVIDIA A100-SXM4-80GB", "bf16") != get_peak_flops("NVIDIA A10", "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measured_flops_of_known_duration(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1,024 x 1,024 product in half a second is 2 x 1,024^3 FLOPs in half a second."""
    clock = [0.0]

    def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        assert left.shape == right.shape == (1024, 1024)
        clock[0] += 0.5
        return out

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert measure_matmul_flops(torch.device("cpu"), precision) == 2 * 1024**3 / 0.5


def test_out_of_memory_in_measurement_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a full device does not fail in this measurement."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "rand", fail)
    assert measure_matmul_flops(torch.device("cpu"), "fp32") is None
