"""Run scaled dot product attention on the meta device with the kernel that the emulated device would select.

Each kernel is called directly, so that it saves the same tensors for the backward pass as on the real device. The math
kernel is reimplemented operation by operation, because torch runs it differently on the meta device: there it adds the
mask out of place, and the dropout mask has the dtype of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from peftbench.common.attention import uses_flash_on_cpu
from peftbench.modeling.sdpa_kernels import KernelChoice, SdpaCall, SdpaDevice, select_kernel

_HALF_PRECISION_DTYPES = frozenset({torch.float16, torch.bfloat16})
_FLASH_WIDTH_MULTIPLE = 8
_EFFICIENT_MASK_MULTIPLE = 16


def attend_on_cuda(  # noqa: PLR0917 — torch's signature
    device: SdpaDevice,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, KernelChoice]:
    """Return the output of the kernel that ``device`` selects, (batch, heads, queries, value width), and the choice."""
    if query.dim() == 4:
        call = SdpaCall.from_tensors(
            query, key, value, attn_mask, dropout=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa
        )
        choice = select_kernel(call, device)
    else:  # check_tensor_shapes
        choice = KernelChoice("math", dict.fromkeys(("flash", "efficient"), "needs inputs of four dimensions"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _convert_boolean_mask(attn_mask, query.dtype)
    saves_logsumexp = any(tensor.requires_grad for tensor in (query, key, value))
    kernels = torch.ops.aten
    if choice.kernel == "cudnn":
        output: torch.Tensor = kernels._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, saves_logsumexp, dropout_p, is_causal, scale=scale
        )[0]
    elif choice.kernel == "flash":
        output = _attend_with_flash(query, key, value, dropout_p, is_causal=is_causal, scale=scale)
    elif choice.kernel == "efficient":
        attn_mask = None if attn_mask is None else _pad_mask(attn_mask, query, key)
        output = kernels._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, saves_logsumexp, dropout_p, is_causal, scale=scale
        )[0]
    else:
        groups = query.shape[1] // key.shape[1] if enable_gqa else None
        output = _attend_with_math(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal=is_causal,
            scale=scale,
            groups=groups,
            dropout=run_cuda_dropout,
        )
    return output, choice


def _attend_with_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    *,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Call flash attention with heads padded to a multiple of 8, as torch does."""
    width = query.shape[-1]
    pad = -width % _FLASH_WIDTH_MULTIPLE
    if pad:
        scale = width**-0.5 if scale is None else scale
        query, key, value = (functional.pad(tensor, (0, pad)) for tensor in (query, key, value))
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return output[..., :width] if pad else output


def _attend_with_math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    *,
    is_causal: bool,
    scale: float | None,
    groups: int | None,
    dropout: Callable[[torch.Tensor, float], torch.Tensor],
) -> torch.Tensor:
    """Mirror ``_scaled_dot_product_attention_math`` (aten/src/ATen/native/transformers/attention.cpp).

    The scores are stored in float32 (batch, heads, queries, keys), also for inputs in 16 bits. ``groups`` is the number
    of query heads per key head with ``enable_gqa``, else None.
    """
    dtype = query.dtype
    if dtype in _HALF_PRECISION_DTYPES:
        query, key, value = query.float(), key.float(), value.float()
    root = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    scaled_query = query * root
    if is_causal:  # variables are rebound where torch's code does it, so that tensors are freed at the same point
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask = _convert_boolean_mask(mask, query.dtype)
    all_keys, all_values = key, value
    if groups is not None:
        all_keys, all_values = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    attention = torch.matmul(scaled_query, all_keys.transpose(-2, -1) * root)
    if mask is not None:
        attention.add_(mask)
    attention = torch._safe_softmax(attention, -1)
    if dropout_p > 0.0:
        attention = dropout(attention, dropout_p)
    return torch.matmul(attention, all_values).to(dtype)


def attend_on_cpu(  # noqa: PLR0917 — torch's signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return the output of the kernel that a CPU selects, (batch, heads, queries, value width)."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _convert_boolean_mask(attn_mask, query.dtype)
    if not uses_flash_on_cpu((query, key, value, attn_mask), dropout_p, is_causal, enable_gqa=enable_gqa):
        groups = query.shape[1] // key.shape[1] if enable_gqa else None
        return _attend_with_math(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal=is_causal,
            scale=scale,
            groups=groups,
            dropout=functional.dropout,
        )
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


def _convert_boolean_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where ``mask`` is True and minus infinity elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _pad_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Pad a mask's rows to a multiple of 16 values, as torch does for the memory-efficient kernel."""
    width = mask.shape[-1]
    if width % _EFFICIENT_MASK_MULTIPLE:
        mask = functional.pad(mask, (0, -width % _EFFICIENT_MASK_MULTIPLE))[..., :width]
    return mask.expand(*query.shape[:3], key.shape[2])


def run_cuda_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Call CUDA's dropout kernel, which saves a mask of one byte per value."""
    if not training or p == 0.0:
        return input
    output: torch.Tensor = torch.native_dropout(input, p, training)[0]
    return output
