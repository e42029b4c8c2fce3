"""Attention of a causal model in training: over each sequence alone, with no mask, so that kernels skip what is masked.

Padding stands at the right, where a causal model never looks from a real token, and documents that share a row are told
apart by their lengths. So no mask is ever built, and no kernel computes pairs to throw them away. On CUDA documents go
to torch's kernel for sequences of unlike lengths (FlashAttention-2, Dao 2023, arXiv:2307.08691); elsewhere, and with
dropout or in float32, which that does not have, each document goes to torch's scaled dot product by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from peftbench.data.collate import Documents
from peftbench.engine.trial import trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attention = Callable[..., tuple[torch.Tensor, None]]
NAME = "peftbench_causal"
"""As transformers' configs name an attention implementation; one without masks of its own is given none."""
_HARMLESS = frozenset({
    "dropout", "scaling", "is_causal", "documents", "position_ids", "position_embeddings", "cache_position",
    "use_cache", "output_attentions", "layer_idx",
})  # fmt: skip
"""What a layer may tell its attention without changing which keys a query looks at."""


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    documents: Documents | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: (rows, heads, positions, width) each; returns (rows, positions, heads, width)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if documents is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, True)
    if query.is_cuda and not dropout and query.dtype in {torch.float16, torch.bfloat16}:
        return _unlike_lengths(query, key, value, documents, scaling)
    lengths = documents.lengths
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    mixed = [sdpa_attention_forward(module, q, k, v, None, dropout, scaling, True)[0] for q, k, v in parts]
    return torch.cat(mixed, dim=1), None


def _unlike_lengths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float | None
) -> tuple[torch.Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds, longest, causal = documents.bounds, documents.longest, (-1, 0)
    mixed = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=causal)
    return mixed[None], None  # type: ignore[call-overload]


@contextmanager
def without_masks(base: PreTrainedModel, attend: Attention = causal_attention) -> Iterator[None]:
    """Let ``base`` attend so; what it computes again in a backward pass must lie within."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    configs: dict[int, Any] = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


@torch.no_grad()
def why_not(base: PreTrainedModel) -> str | None:
    """Why a base cannot attend so, None where it can: every layer must ask for nothing but causal attention.

    It is found out in a forward pass over two documents of one token.
    """
    if base.config._attn_implementation != "sdpa":
        return f"its attention is {base.config._attn_implementation}"
    told: list[dict[str, Any]] = []

    def listening(*given: Any, **named: Any) -> tuple[torch.Tensor, None]:
        told.append(named)
        return causal_attention(*given, **named)

    documents = Documents.of([1, 1], device=base.device)
    try:
        with trial(base), without_masks(base, listening):
            ids = torch.zeros((1, 2), dtype=torch.long, device=base.device)
            base(input_ids=ids, position_ids=documents.position_ids, documents=documents, use_cache=False)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        return f"it cannot be told of documents ({str(error).splitlines()[0][:100]})"
    if len(told) != base.config.num_hidden_layers or any(named.get("documents") is None for named in told):
        return "not all of its layers attend through transformers' interface"
    extra = {name for named in told for name, value in named.items() if value is not None and name not in _HARMLESS}
    return f"its layers ask their attention for {', '.join(sorted(extra))}" if extra else None
