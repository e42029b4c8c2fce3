"""Causal attention for training without a mask tensor, so that kernels skip masked pairs.

Padding is on the right, where real tokens of a causal model never attend, and packed sequences are separated by their
lengths. No mask is built, and no kernel computes pairs only to discard them. On CUDA, packed sequences use torch's
variable-length kernel (FlashAttention-2, Dao 2023, arXiv:2307.08691). On other devices, with dropout or in float32,
which that kernel does not support, each sequence is a separate call of torch's scaled dot product attention.

On CPU, attention is always computed in float32: in 16 bits, torch compiles machine code for each new length and keeps
it all, which adds up to hundreds of megabytes (benchmarks/cpu_sizes). Attention that transformers computes (generation,
models that need their own masks) is unchanged.
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
    packed_sequences: PackedSequences | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention signature.

    Takes (rows, heads, positions, width) each, returns (rows, positions, heads, width).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.utils import generic

    if _is_upcast_to_float32(query):
        with generic.maybe_autocast(query.device.type, enabled=False):
            output, _none = causal_attention(
                module,
                query.float(),
                key.float(),
                value.float(),
                None,
                packed_sequences=packed_sequences,
                dropout=dropout,
                scaling=scaling,
            )
        return output.to(value.dtype), None
    if packed_sequences is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, True)
    if not dropout and _has_varlen_kernel(query):
        return _varlen_attention(query, key, value, packed_sequences, scaling)
    lengths = packed_sequences.lengths
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, dropout, scaling, True)[0] for q, k, v in parts]
    return torch.cat(outputs, dim=1), None


def _is_upcast_to_float32(query: torch.Tensor) -> bool:
    """True if attention must be upcast: 16-bit inputs, or rotated float32 queries that autocast would downcast."""
    return query.device.type == "cpu" and (query.dtype in _HALF_PRECISION_DTYPES or torch.is_autocast_enabled("cpu"))


def _has_varlen_kernel(query: torch.Tensor) -> bool:
    """True if torch's variable-length kernel supports the input: 16 bits, Ampere or newer, head width up to 256."""
    if not query.is_cuda or query.dtype not in _HALF_PRECISION_DTYPES:
        return False
    width = query.shape[-1]
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences, scaling: float | None
) -> tuple[torch.Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds, longest, causal = packed.cu_seqlens, packed.max_seqlen, (-1, 0)
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=causal)
    return output[None], None  # type: ignore[call-overload]


@contextmanager
def mask_free_attention(base: PreTrainedModel, attention_fn: AttentionFunction = causal_attention) -> Iterator[None]:
    """Use ``attention_fn`` in ``base``; a backward pass that recomputes activations must run inside the context too."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_fn)
    with use_attention(base, ATTENTION_NAME):
        yield


@contextmanager
def use_attention(base: PreTrainedModel, name: str) -> Iterator[None]:
    """Use the implementation that transformers knows by ``name`` in ``base``."""
    configs: dict[int, Any] = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}
    original = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = original[key]
