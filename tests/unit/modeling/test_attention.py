"""Attention with grouped queries: repeated keys and values change the kernel, not the output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftbench.modeling import attention
from peftbench.modeling.sdpa_kernels import SdpaDevice

T4, A100 = SdpaDevice((7, 5), 91900), SdpaDevice((8, 0), 91900)


def build_inputs(width: int, value_width: int, queries: int) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a module with three query heads per key head, and random queries, keys and values."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, of_width)
        for heads, length, of_width in ((6, queries, width), (2, 8, width), (2, 8, value_width))
    )
    return SimpleNamespace(num_key_value_groups=3, is_causal=True), query, key, value


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (288, 288), (192, 128), (5, 5)])
@pytest.mark.parametrize("queries", [8, 1])
def test_repeated_keys_do_not_change_the_output(
    width: int, value_width: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers repeats keys itself: wide heads, and heads of two widths."""
    module, query, key, value = build_inputs(width, value_width, queries)
    expected, _ = sdpa_attention_forward(module, query, key, value, None)
    for device in (None, T4, A100):
        monkeypatch.setattr(attention, "_get_sdpa_device", lambda _, device=device: device)
        output, _ = attention.sdpa_attention(module, query, key, value, None)
        assert output.shape == (2, queries, 6, value_width)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "repeats"),
    [
        (T4, torch.float16, 64, True),
        (T4, torch.float32, 64, True),
        (A100, torch.float32, 64, True),
        (A100, torch.float16, 64, False),
        (A100, torch.float32, 6, False),  # no fused kernel, repeated or not
        (A100, torch.float32, 288, False),  # transformers repeats
        (None, torch.float32, 64, False),
    ],
)
def test_keys_are_repeated_only_where_that_selects_a_fused_kernel(
    device: SdpaDevice | None, dtype: torch.dtype, width: int, repeats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason lists what each kernel lacks."""
    monkeypatch.setattr(attention, "_get_sdpa_device", lambda _: device)
    module, *tensors = build_inputs(width, width, 8)
    query, key, value = (tensor.to(dtype) for tensor in tensors)
    reason = attention._explain_kv_repetition(module, query, key, value, {})
    assert (reason is not None) == repeats
    if reason is not None:
        assert reason.endswith("does not support 6 query heads with 2 key and 2 value heads")


@pytest.mark.parametrize(
    ("device", "dtype", "width", "value_width", "has_kernel"),
    [
        (A100, torch.bfloat16, 64, 64, True),
        (A100, torch.bfloat16, 12, 12, False),
        (A100, torch.bfloat16, 192, 128, False),
        (A100, torch.float32, 64, 64, False),
        (SdpaDevice((8, 6), 0), torch.bfloat16, 224, 224, False),
        (T4, torch.float16, 64, 64, False),
        (None, torch.bfloat16, 64, 64, False),
    ],
)
def test_packed_rows_use_the_variable_length_kernel_where_flash_attention_runs(  # noqa: PLR0917
    device: SdpaDevice | None,
    dtype: torch.dtype,
    width: int,
    value_width: int,
    has_kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads of two widths (MLA) and widths without a backward pass are split into rows instead."""
    monkeypatch.setattr(attention, "_get_sdpa_device", lambda _: device)
    _, *tensors = build_inputs(width, value_width, 8)
    query, key, value = (tensor.to(dtype).requires_grad_() for tensor in tensors)
    assert attention._has_varlen_kernel(query, key, value) == has_kernel
