"""The kernel of scaled dot product attention for each kind of call and each kind of GPU, and the reason."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from peftbench.memory.devices import load_devices
from peftbench.modeling import sdpa_kernels
from peftbench.modeling.sdpa_kernels import SdpaCall, SdpaDevice, SdpaKernel, Shape, find_obstacle, select_kernel

CUDNN = 91900
CAPABILITIES = {
    "t4": (7, 5),
    "v100": (7, 0),
    "a100": (8, 0),
    "a10g": (8, 6),
    "h100": (9, 0),
    "b200": (10, 0),
    "5090": (12, 0),
}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def build_call(
    dtype: torch.dtype,
    heads: int = 8,
    key_heads: int = 8,
    width: int = 64,
    value_width: int | None = None,
    **changes: Any,
) -> SdpaCall:
    """Return a causal call of a training step with two rows of 100 tokens."""
    query: Shape = (2, heads, 100, width)
    key: Shape = (2, key_heads, 100, width)
    value: Shape = (2, key_heads, 100, width if value_width is None else value_width)
    values: dict[str, Any] = {"is_causal": True, "enable_gqa": heads != key_heads, "requires_grad": True}
    return SdpaCall((dtype,) * 3, query, key, value, **values | changes)


EXPECTED: list[tuple[str, SdpaCall, SdpaKernel]] = [
    ("t4", build_call(FP16), "efficient"),
    ("t4", build_call(FP32), "efficient"),
    ("t4", build_call(BF16), "math"),
    ("t4", build_call(FP16, key_heads=2), "math"),
    ("t4", build_call(FP32, key_heads=2), "math"),
    ("t4", build_call(FP32, width=5), "efficient"),
    ("t4", build_call(FP16, width=12), "math"),
    ("v100", build_call(FP16), "efficient"),
    ("a100", build_call(BF16), "flash"),
    ("a100", build_call(BF16, key_heads=2), "flash"),
    ("a100", build_call(FP32), "efficient"),
    ("a100", build_call(FP32, key_heads=2), "math"),
    ("a100", build_call(FP32, width=6), "math"),
    ("a100", build_call(BF16, width=6), "flash"),
    ("a100", build_call(BF16, width=288), "efficient"),
    ("a100", build_call(BF16, width=192, value_width=128), "efficient"),
    ("a100", build_call(BF16, is_causal=False, mask=(2, 1, 100, 100)), "efficient"),
    ("a100", build_call(BF16, key_heads=2, is_causal=False, mask=(2, 1, 100, 100)), "math"),
    ("a100", build_call(BF16, dropout=0.1), "flash"),
    ("a100", build_call(BF16, width=224), "flash"),
    ("a10g", build_call(BF16, width=224), "efficient"),
    ("a10g", build_call(BF16, width=224, requires_grad=False), "flash"),
    ("a10g", build_call(BF16, width=256), "flash"),
    ("a10g", build_call(BF16, width=256, dropout=0.1), "efficient"),
    ("5090", build_call(BF16, width=224), "efficient"),
    ("h100", build_call(BF16), "cudnn"),
    ("h100", build_call(BF16, key_heads=2), "cudnn"),
    ("h100", build_call(BF16, dropout=0.1), "flash"),
    ("h100", build_call(BF16, dropout=0.125), "cudnn"),
    ("h100", build_call(BF16, width=4), "flash"),
    ("h100", build_call(BF16, width=192, value_width=128), "cudnn"),
    ("h100", build_call(BF16, is_causal=False, mask=(2, 1, 100, 100)), "cudnn"),
    ("h100", build_call(FP32, is_causal=False, mask=(2, 1, 100, 100)), "efficient"),
    ("h100", build_call(BF16, is_causal=False, mask=(2, 1, 100, 100), mask_requires_grad=True), "efficient"),
    ("b200", build_call(BF16, width=192, value_width=128), "cudnn"),
    ("b200", build_call(BF16, width=256), "flash"),
    ("a100", build_call(BF16, has_unit_stride=False), "math"),
    ("a100", replace(build_call(BF16), query=(2, 8, 1, 64)), "efficient"),
    ("a100", replace(build_call(BF16), query=(2, 8, 0, 64)), "math"),
    ("h100", replace(build_call(BF16, is_causal=False), key=(2, 8, 1, 64), value=(2, 8, 1, 64)), "flash"),
    ("a100", replace(build_call(BF16), key=(1, 8, 100, 64), value=(1, 8, 100, 64)), "math"),
]


@pytest.mark.parametrize(("gpu", "call", "kernel"), EXPECTED)
def test_first_supported_kernel_is_selected(gpu: str, call: SdpaCall, kernel: SdpaKernel) -> None:
    """Each kernel that torch tries before it has an obstacle."""
    choice = select_kernel(call, SdpaDevice(CAPABILITIES[gpu], CUDNN))
    assert choice.kernel == kernel
    order = ["cudnn", "flash", "efficient", "math"] if gpu in {"h100", "b200"} else ["flash", "efficient", "math"]
    assert list(choice.obstacles) == order[: order.index(kernel)]
    assert all(choice.obstacles.values())


def test_expected_kernels_include_every_kernel() -> None:
    """EXPECTED contains every kernel."""
    assert {kernel for _, _, kernel in EXPECTED} == set(get_args(SdpaKernel))


@pytest.mark.parametrize(
    ("kernel", "gpu", "call", "obstacle"),
    [
        (
            "efficient",
            "t4",
            build_call(FP16, key_heads=2),
            "does not support 8 query heads with 2 key and 2 value heads",
        ),
        ("efficient", "t4", build_call(BF16), "needs float16 or float32, not bfloat16"),
        ("flash", "t4", build_call(FP16), "needs compute capability 8.0 to 12.1, not 7.5"),
        ("flash", "a100", build_call(FP32), "needs float16 or bfloat16, not float32"),
        ("flash", "a100", build_call(BF16, width=288), "supports head dimensions up to 256, not 288"),
        ("flash", "a100", build_call(BF16, mask=(100, 100)), "does not support a mask"),
        (
            "efficient",
            "a100",
            build_call(BF16, width=12),
            "needs head dimensions that are multiples of 8, not 12 for keys and 12 for values",
        ),
        ("cudnn", "h100", build_call(BF16, dropout=0.1), "needs a dropout that is a multiple of 1/16, not 0.1"),
        (
            "cudnn",
            "h100",
            build_call(BF16, mask=(3, 1, 100, 100)),
            "does not support a mask of shape (3, 1, 100, 100)",
        ),
    ],
)
def test_obstacle_is_a_predicate(kernel: SdpaKernel, gpu: str, call: SdpaCall, obstacle: str) -> None:
    """It names what the kernel needs and what the call has."""
    assert find_obstacle(kernel, call, SdpaDevice(CAPABILITIES[gpu], CUDNN)) == obstacle


def test_older_cudnn_is_not_preferred() -> None:
    """Torch prefers cuDNN from 9.15.1, on Hopper and on the data center cards of Blackwell."""
    call = build_call(BF16)
    assert select_kernel(call, SdpaDevice((9, 0), 91500)).kernel == "flash"
    assert select_kernel(call, SdpaDevice((12, 0), CUDNN)).kernel == "flash"


def test_every_known_gpu_has_a_fused_kernel() -> None:
    """Attention without grouped queries stores no score matrix in float32 and in the precision of auto."""
    gpus = [facts for facts in load_devices().values() if facts.compute_capability is not None]
    assert len(gpus) > 15
    for facts in gpus:
        assert facts.compute_capability is not None
        dtype = BF16 if facts.capability.has_bf16 else FP16
        for of_call in (dtype, FP32):
            choice = select_kernel(build_call(of_call), SdpaDevice(facts.compute_capability, CUDNN))
            assert choice.kernel != "math"


def test_facts_come_from_tensors() -> None:
    """Strides, gradients and shapes are read from the arguments of a call."""
    query, key = torch.zeros(2, 4, 10, 8, requires_grad=True), torch.zeros(2, 2, 10, 8)
    call = SdpaCall.from_tensors(query, key, key, torch.zeros(1, 1, 10, 10), dropout=0.5, enable_gqa=True)
    assert call == SdpaCall(
        (FP32,) * 3, (2, 4, 10, 8), (2, 2, 10, 8), (2, 2, 10, 8), (1, 1, 10, 10), 0.5, False, True, True, False, True
    )
    assert not SdpaCall.from_tensors(query.mT.contiguous().mT, key, key).has_unit_stride
    with torch.no_grad():
        assert not SdpaCall.from_tensors(query, key, key).requires_grad


def test_cited_lines_are_those_of_the_installed_torch() -> None:
    """The header in the wheel defines each cited function at the cited line."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "native" / "transformers" / "sdp_utils_cpp.h"
    lines = header.read_text(encoding="utf-8").splitlines()
    source = Path(sdpa_kernels.__file__).read_text(encoding="utf-8")
    cited = re.findall(r"``(check_\w+)``[^`]*?\(line (\d+)\)", source)
    assert len(cited) >= 7
    for function, line in cited:
        assert f" {function}(" in lines[int(line) - 1]
