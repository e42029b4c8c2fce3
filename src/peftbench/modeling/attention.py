"""Causal attention for training without a mask tensor, so that kernels skip masked pairs.

Padding is on the right, where real tokens of a causal model never attend, and packed sequences are separated by their
lengths. No mask is built, and no kernel computes pairs only to discard them. On CUDA, packed sequences use torch's
variable-length kernel (FlashAttention-2, Dao 2023, arXiv:2307.08691). On other devices, with dropout or in float32,
which that kernel does not support, each sequence is a separate call of torch's scaled dot product attention.

torch's memory-efficient attention does not support grouped queries (:mod:`peftbench.modeling.sdpa_kernels`). In float32
on every GPU, and in fp16 on GPUs older than Ampere, torch falls back to its math kernel, which stores the score matrix.
In these cases keys and values are repeated first, so that torch selects a fused kernel.

On CPU, attention is always computed in float32: in 16 bits, torch compiles machine code for each new length and keeps
it all, which adds up to hundreds of megabytes (benchmarks/cpu_sizes). In generation and in models that need their own
masks, transformers computes attention, with repeated keys and values as above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from peftbench.common.attention import ATTENTION_NAME
from peftbench.data.collate import PackedSequences
from peftbench.modeling.sdpa_kernels import SdpaCall, SdpaDevice, Shape, find_obstacle, select_kernel

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
        return sdpa_attention(module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=True)
    if not dropout and _has_varlen_kernel(query, key, value):
        return _varlen_attention(query, key, value, packed_sequences, scaling)
    lengths = packed_sequences.lengths
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True)[0] for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1), None


def register_sdpa_attention() -> None:
    """Register :func:`sdpa_attention` as transformers' ``sdpa``; generation and models with their own masks use it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention)


def sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Call transformers' ``sdpa`` attention, with keys and values repeated where that avoids the score matrix.

    Arguments and result are those of transformers' function.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if attention_mask is None and _explain_kv_repetition(module, query, key, value, kwargs) is not None:
        dtype = _get_attention_dtype(query)  # as autocast would, but before the copies are made
        groups = query.shape[1] // key.shape[1]
        key, value = (repeat_kv(tensor.to(dtype), groups) for tensor in (key, value))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _explain_kv_repetition(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> str | None:
    """Return why keys and values must be repeated to avoid the score matrix; None if that is not needed or no use.

    It is not needed where transformers repeats them itself: for a mask, and for heads that no fused kernel supports.
    """
    from transformers.integrations.sdpa_attention import use_gqa_in_sdpa

    device = _get_sdpa_device(query)
    has_groups = getattr(module, "num_key_value_groups", 1) > 1
    if device is None or not has_groups or not use_gqa_in_sdpa(kwargs.get("position_bias"), key, value):
        return None
    call = _build_call(query, key, value, dropout=kwargs.get("dropout") or 0.0, is_causal=query.shape[2] > 1)
    repeated = replace(call, key=_repeat_heads(call.key, call.query), value=_repeat_heads(call.value, call.query))
    choice = select_kernel(call, device)
    is_avoidable = choice.kernel == "math" and select_kernel(repeated, device).kernel != "math"
    return choice.describe_obstacles() if is_avoidable else None


def _build_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, is_causal: bool
) -> SdpaCall:
    """Return the facts of a call without a mask, in the dtype that autocast gives it."""
    call = SdpaCall.from_tensors(query, key, value, dropout=dropout, is_causal=is_causal, enable_gqa=True)
    return replace(call, dtypes=(_get_attention_dtype(query),) * 3)


def _repeat_heads(shape: Shape, query: Shape) -> Shape:
    return shape[0], query[1], shape[2], shape[3]


def _get_sdpa_device(tensor: torch.Tensor) -> SdpaDevice | None:
    """Return the facts of the tensor's device that select a kernel; None on CPU."""
    if not tensor.is_cuda:
        return None
    return SdpaDevice(torch.cuda.get_device_capability(tensor.device), torch.backends.cudnn.version() or 0)


def _get_attention_dtype(query: torch.Tensor) -> torch.dtype:
    """Return the type in which torch computes attention: autocast's, if it is enabled."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype


def _is_upcast_to_float32(query: torch.Tensor) -> bool:
    """True if attention must be upcast: 16-bit inputs, or rotated float32 queries that autocast would downcast."""
    return query.device.type == "cpu" and (query.dtype in _HALF_PRECISION_DTYPES or torch.is_autocast_enabled("cpu"))


def _has_varlen_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """True if torch's variable-length kernel supports the input: that of flash attention, without padding of heads."""
    device = _get_sdpa_device(query)
    if device is None or query.shape[-1] % 8:
        return False
    return find_obstacle("flash", _build_call(query, key, value, dropout=0.0, is_causal=True), device) is None


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences, scaling: float | None
) -> tuple[torch.Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    dtype = _get_attention_dtype(query)  # rotated queries and keys are float32, and autocast does not know the kernel
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    bounds, longest = packed.cu_seqlens, packed.max_seqlen
    output = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
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
