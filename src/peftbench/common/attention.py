"""Attention for modules that may not import its code: its name in transformers, and torch's choice of a kernel."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes

ATTENTION_NAME = "peftbench_causal"
"""A config's ``_attn_implementation`` in training. transformers builds no mask for a name without mask functions."""


def is_fused_attention(  # noqa: PLR0917 — torch's signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    enable_gqa: bool,
) -> bool:
    """True if torch selects a fused kernel of ``scaled_dot_product_attention``. Always True on the meta device."""
    if query.device.type == "meta":
        return True
    with torch._C.DisableTorchFunction():
        if torch.is_autocast_enabled(query.device.type):  # it casts the arguments before torch selects a kernel
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        choice = torch._fused_sdp_choice(query, key, value, mask, dropout_p, is_causal, enable_gqa=enable_gqa)  # type: ignore[call-arg]
    return choice != SDPBackend.MATH.value


def uses_flash_on_cpu(
    tensors: tuple[torch.Tensor | None, ...], dropout_p: float, is_causal: bool, *, enable_gqa: bool
) -> bool:
    """True if a CPU would select flash attention for query, key, value and mask of these shapes.

    torch is asked with CPU tensors that are never written and take no memory.
    """
    with _disable_current_modes():  # a simulation would count them
        query, key, value, mask = (
            None
            if tensor is None
            else torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, requires_grad=tensor.requires_grad
            )
            for tensor in tensors
        )
        choice = torch._fused_sdp_choice(query, key, value, mask, dropout_p, is_causal, enable_gqa=enable_gqa)  # type: ignore[arg-type, call-arg]
    return bool(choice == SDPBackend.FLASH_ATTENTION.value)
