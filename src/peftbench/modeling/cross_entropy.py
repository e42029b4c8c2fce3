"""Summed cross-entropy of a linear head that never holds the logits of all positions.

The gradient of a cross-entropy follows from its logits alone. So the forward pass computes each chunk's logits and
gradients and frees the logits; the backward pass only scales the gradients. Nothing is computed twice (as in Hsu et al.
2024, Liger Kernel, arXiv:2410.10989; here in plain torch, for any device).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.nn import functional

from peftbench.errors import EngineError

CHUNK_LOGITS = 2**25
"""Maximum number of logits in memory: 128 MiB in float32, and the same for their gradient."""


def chunked_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of ``hidden @ weight.T + bias`` with ``targets``, summed over positions (nats, float32).

    ``hidden`` (positions, width), ``weight`` (vocabulary, width), ``bias`` (vocabulary,), ``targets`` (positions,).
    """
    if hidden.shape[0] * weight.shape[0] <= CHUNK_LOGITS:
        return functional.cross_entropy(functional.linear(hidden, weight, bias).float(), targets, reduction="sum")
    dtype = _compute_dtype(hidden)
    grad_enabled = torch.is_grad_enabled()
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, dtype, grad_enabled)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def cross_entropy_per_token(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Return the same cross-entropy for each position, without gradients: (positions,), float32."""
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    for part in iterate_chunks(hidden.shape[0], weight.shape[0]):
        logits = functional.linear(hidden[part], weight, bias).float()
        losses[part] = functional.cross_entropy(logits, targets[part], reduction="none")
    return losses


def iterate_chunks(num_positions: int, vocabulary: int) -> Iterator[slice]:
    """Yield the positions of each chunk of logits. A simulation replaces this function, since full chunks repeat."""
    rows = max(1, CHUNK_LOGITS // vocabulary)
    for start in range(0, num_positions, rows):
        yield slice(start, start + rows)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype of matrix products, which autocast may set."""
    device_type = hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients one chunk of logits at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, dtype: Any, grad_enabled: Any) -> Any:  # noqa: PLR0917
        """Compute the loss and the gradients that the backward pass needs."""
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        matrix = weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        to_hidden = torch.empty_like(hidden) if needs[0] else None
        to_weight = torch.zeros_like(weight) if needs[1] else None
        to_bias = torch.zeros_like(bias) if needs[2] else None
        for part in iterate_chunks(hidden.shape[0], weight.shape[0]):
            states, expected = hidden[part].to(dtype), targets[part, None]
            logits = functional.linear(states, matrix, None if bias is None else bias.to(dtype)).float()
            logits -= logits.logsumexp(dim=-1, keepdim=True)
            total -= logits.gather(1, expected).sum()
            if not any(needs):
                continue
            error = logits.exp_().scatter_add_(1, expected, logits.new_full((1, 1), -1.0).expand_as(expected)).to(dtype)
            if to_hidden is not None:
                to_hidden[part] = error @ matrix
            if to_weight is not None:
                to_weight += error.T @ states
            if to_bias is not None:
                to_bias += error.sum(dim=0)
        ctx.gradients = (to_hidden, to_weight, to_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Scale the stored gradients in place by the incoming one; they are freed, so this works once.

        Raises:
            RuntimeError: a second backward pass.
        """
        if not ctx.gradients:
            raise RuntimeError("this loss supports one backward pass, and it already ran; compute the loss again")
        scaled = [None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in ctx.gradients]
        ctx.gradients = ()
        return (*scaled, None, None, None)


CrossEntropySum = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""Signature of :func:`chunked_cross_entropy_sum`."""
Kernel = Literal["torch", "liger"]


def _load_liger() -> CrossEntropySum:
    """Return Liger Kernel's fused loss.

    Raises:
        EngineError: Liger Kernel is not installed.
    """
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise EngineError(
            f"train.cross_entropy=liger needs Liger Kernel ({error}); pip install liger-kernel, or use torch"
        ) from error
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def liger_cross_entropy_sum(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        dtype = _compute_dtype(hidden)
        if weight.requires_grad and not hidden.requires_grad:  # else Liger computes no gradient over a frozen backbone
            hidden = hidden.detach().requires_grad_()
        cast_bias = None if bias is None else bias.to(dtype)
        result: torch.Tensor = loss(weight.to(dtype), hidden.to(dtype), targets, cast_bias)
        return result.float()

    return liger_cross_entropy_sum


KERNELS: dict[Kernel, Callable[[], CrossEntropySum]] = {
    "torch": lambda: chunked_cross_entropy_sum,
    "liger": _load_liger,
}
