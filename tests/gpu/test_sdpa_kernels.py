"""The conditions of :mod:`peftbench.modeling.sdpa_kernels` are torch's own, on the GPU that runs this test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from peftbench.modeling.attention import _get_sdpa_device
from peftbench.modeling.sdpa_kernels import SdpaCall, SdpaKernel, find_obstacle, select_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float, bool, bool]
QUERIES: dict[SdpaKernel, Callable[..., bool]] = {
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "flash": torch.backends.cuda.can_use_flash_attention,
    "efficient": torch.backends.cuda.can_use_efficient_attention,
}
BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""Values of ``torch.nn.attention.SDPBackend``."""


def iter_calls() -> Iterator[Arguments]:
    """Yield calls that differ in every argument on which a condition depends."""
    axes = itertools.product(
        (torch.float32, torch.float16, torch.bfloat16),
        (8, 2),  # key heads
        ((64, 64), (6, 6), (192, 128), (224, 224), (256, 256), (288, 288)),  # widths of keys and values
        (None, (2, 1, 40, 40), (40, 40), (3, 1, 40, 40)),  # mask
        (0.0, 0.1, 0.125),  # dropout
        (True, False),  # requires_grad
        (40, 1),  # queries
    )
    for dtype, key_heads, (width, value_width), mask, dropout, requires_grad, queries in axes:
        if mask is not None and queries == 1:
            continue
        query, key, value = (
            torch.zeros(2, heads, length, of_width, dtype=dtype, device="cuda", requires_grad=requires_grad)
            for heads, length, of_width in ((8, queries, width), (key_heads, 40, width), (key_heads, 40, value_width))
        )
        given = None if mask is None else torch.zeros(mask, dtype=dtype, device="cuda")
        yield query, key, value, given, dropout, mask is None and queries > 1, key_heads != 8


def to_call(arguments: Arguments) -> SdpaCall:
    """Return the facts of a call."""
    query, key, value, mask, dropout, is_causal, enable_gqa = arguments
    return SdpaCall.from_tensors(query, key, value, mask, dropout=dropout, is_causal=is_causal, enable_gqa=enable_gqa)


@pytest.mark.parametrize("kernel", QUERIES)
def test_conditions_equal_torch(kernel: SdpaKernel) -> None:
    """find_obstacle returns None exactly for the calls that torch supports."""
    differences = []
    for arguments in iter_calls():
        device = _get_sdpa_device(arguments[0])
        assert device is not None
        obstacle = find_obstacle(kernel, to_call(arguments), device)
        can_use = QUERIES[kernel](torch.backends.cuda.SDPAParams(*arguments), debug=False)
        if can_use != (obstacle is None):
            differences.append((to_call(arguments), can_use, obstacle))
    assert not differences


def test_selected_kernel_is_the_one_that_torch_selects() -> None:
    """The order of kernels is torch's, too."""
    differences = []
    for query, key, value, mask, dropout, is_causal, enable_gqa in iter_calls():
        device = _get_sdpa_device(query)
        assert device is not None
        call = to_call((query, key, value, mask, dropout, is_causal, enable_gqa))
        chosen = BACKENDS[torch._fused_sdp_choice(query, key, value, mask, dropout, is_causal, enable_gqa=enable_gqa)]
        if chosen != select_kernel(call, device).kernel:
            differences.append((call, chosen, select_kernel(call, device)))
    assert not differences
