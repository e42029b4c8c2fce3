"""What a device could compute."""

from __future__ import annotations

import time

import pytest
import torch

from peftbench.profiler.peak_flops import PEAK_FLOPS, get_peak_flops, measure_matmul_flops


def test_a_known_device() -> None:
    """Names are torch's, which may go on after what the table has."""
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
def test_what_is_not_in_the_table_is_unknown(name: str, precision: str) -> None:
    """An unknown device, or a precision that a device does not have, is None and no other device's figure."""
    assert get_peak_flops(name, precision) is None


def test_no_name_begins_another() -> None:
    """One device has one row."""
    assert len(PEAK_FLOPS) >= 5
    assert not [(a, b) for a in PEAK_FLOPS for b in PEAK_FLOPS if a != b and a.startswith(f"{b}-")]
    assert get_peak_flops("NVIDIA A100-SXM4-80GB", "bf16") != get_peak_flops("NVIDIA A10", "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_achievable_is_what_a_product_takes(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 1,024 x 1,024 that takes half a second is 2 x 1,024^3 operations in half a second."""
    clock = [0.0]

    def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        assert left.shape == right.shape == (1024, 1024)
        clock[0] += 0.5
        return out

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert measure_matmul_flops(torch.device("cpu"), precision) == 2 * 1024**3 / 0.5


def test_no_room_for_the_product_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went well and filled the device does not fail by its last measurement."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "rand", fail)
    assert measure_matmul_flops(torch.device("cpu"), "fp32") is None
