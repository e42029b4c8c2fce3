"""Layer normalization of 16-bit values on CPU, whose saved statistics have the type of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def normalize_on_cpu(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Call torch's layer normalization with the tensors that its CPU kernel keeps; on meta it keeps float32 statistics.

    See ``layer_norm_cpu`` (aten/src/ATen/native/layer_norm.cpp).
    """
    if input.dtype == torch.float32 or weight is None:
        return torch.layer_norm(input, normalized_shape, weight, bias, eps)
    output: torch.Tensor = _CpuLayerNorm.apply(input, len(normalized_shape), weight, bias)  # type: ignore[no-untyped-call]
    return output


class _CpuLayerNorm(torch.autograd.Function):
    """Allocates what the CPU kernel does, on the meta device."""

    @staticmethod
    def forward(ctx: Any, input: Any, num_dims: Any, weight: Any, bias: Any) -> Any:
        """Allocate the output, and mean and deviation of each row."""
        output = torch.empty_like(input)
        shape = (*input.shape[:-num_dims], *(1,) * num_dims)
        statistics = [torch.empty(shape, dtype=weight.dtype, device=input.device) for _ in range(2)]
        ctx.save_for_backward(input, weight, bias, *statistics)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Allocate the gradients that are needed."""
        input, weight, bias, *_ = ctx.saved_tensors
        needed = zip((input, None, weight, bias), ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if is_needed else None for tensor, is_needed in needed)
