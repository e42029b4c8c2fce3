"""Attention of a causal model in training: over each sequence alone, with no mask, so that kernels skip what is masked.

Padding stands at the right, where a causal model never looks from a real token, and documents that share a row are told
apart by their lengths. So no mask is ever built, and no kernel computes pairs to throw them away. On CUDA documents go
to torch's kernel for sequences of unlike lengths (FlashAttention-2, Dao 2023, arXiv:2307.08691); elsewhere, and with
dropout or in float32, which that does not have, each document goes to torch's scaled dot product by itself.

On a CPU that is done in float32 whatever comes in: in 16 bits torch has machine code made for each new length and keeps
it all, which comes to hundreds of megabytes (benchmarks/cpu_sizes). Attention that is left to transformers (generation,
models with masks of their own) is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from peftbench.common.attention import ATTENTION_NAME
from peftbench.data.collate import PackedSequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HALF_PRECISION_DTYPES = frozenset({torch.float16, torch.bfloat16})
AttentionFunction = Callable[..., tuple[torch.Tensor, None]]


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    documents: PackedSequences | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: (rows, heads, positions, width) each; returns (rows, positions, heads, width)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.utils import generic

    if _is_upcast_to_float32(query):
        with generic.maybe_autocast(query.device.type, enabled=False):
            mixed, _none = causal_attention(
                module,
                query.float(),
                key.float(),
                value.float(),
                None,
                documents=documents,
                dropout=dropout,
                scaling=scaling,
            )
        return mixed.to(value.dtype), None
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, True)
    if not dropout and _has_varlen_kernel(query):
        return _varlen_attention(query, key, value, documents, scaling)
    lengths = documents.lengths
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    alone = [sdpa_attention_forward(module, q, k, v, None, dropout, scaling, True)[0] for q, k, v in parts]
    return torch.cat(alone, dim=1), None


def _is_upcast_to_float32(query: torch.Tensor) -> bool:
    """Whether it is to be widened: what comes in fewer bits, and rotated queries, which autocast would narrow."""
    return query.device.type == "cpu" and (query.dtype in _HALF_PRECISION_DTYPES or torch.is_autocast_enabled("cpu"))


def _has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether torch's kernel for unlike lengths takes it: in 16 bits, on Ampere or newer, heads of up to 256."""
    if not query.is_cuda or query.dtype not in _HALF_PRECISION_DTYPES:
        return False
    width = query.shape[-1]
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedSequences, scaling: float | None
) -> tuple[torch.Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds, longest, causal = documents.cu_seqlens, documents.max_seqlen, (-1, 0)
    mixed = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=causal)
    return mixed[None], None  # type: ignore[call-overload]


@contextmanager
def mask_free_attention(base: PreTrainedModel, attention_fn: AttentionFunction = causal_attention) -> Iterator[None]:
    """Let ``base`` attend so; what it computes again in a backward pass must lie within."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_fn)
    configs: dict[int, Any] = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = ATTENTION_NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
