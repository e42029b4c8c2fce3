"""Whether a base may attend without masks: found out in forward passes of a few tokens, not looked up by name.

Three things are asked. What mask it would have built must be the causal one and nothing more. What its layers ask of
their attention must be causal attention and nothing more. And two documents that share a row must come out as each does
alone, which no state that flows on, no position counted otherwise and no layer of another kind passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from peftbench.data.collate import PackedSequences
from peftbench.modeling.attention import causal_attention, mask_free_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALLOWED_ATTENTION_KWARGS = frozenset(
    {
        "dropout",
        "scaling",
        "is_causal",
        "documents",
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "layer_idx",
    }
)
"""What a layer may tell its attention without changing which keys a query looks at."""
_LENGTH_DEPENDENT_ROPE_TYPES = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies depend on the longest sequence of a forward pass."""
_TEST_LENGTHS = (5, 4)
_FLOAT32_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-3, 5e-2
"""How far documents may be apart, of their logits' norm: in float32, and with weights in fewer bits."""


@torch.no_grad()
def find_mask_free_blocker(base: PreTrainedModel) -> str | None:
    """Why a base cannot attend without masks, None where it can.

    To be asked before the base is prepared for fewer bits. On the meta device, which has no values, documents are not
    compared.
    """
    if base.config._attn_implementation != "sdpa":
        return f"its attention is {base.config._attn_implementation}"
    rotary = getattr(base.config, "rope_parameters", None) or getattr(base.config, "rope_scaling", None) or {}
    kinds = {rotary.get("rope_type")} | {kind.get("rope_type") for kind in rotary.values() if isinstance(kind, dict)}
    if found := kinds & _LENGTH_DEPENDENT_ROPE_TYPES:
        return f"its {found.pop()} rotary embeddings depend on the longest sequence"
    try:
        with isolated_forward(base):
            return _check_masks(base) or _check_attention_kwargs(base) or _check_sequence_isolation(base)
    except Exception as error:  # whatever a model's code does with what it does not know; it then stays as it is
        return f"it cannot be told of documents ({(str(error) or type(error).__name__).splitlines()[0][:100]})"


@contextmanager
def _record_mask_functions(mask_functions: list[Any]) -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def listening(*given: Any, **named: Any) -> Any:
        mask_functions.append(named.get("mask_function"))
        return original(*given, **named)

    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", listening)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", original)


def _check_masks(base: PreTrainedModel) -> str | None:
    """What is more than causal in the masks that transformers would build for one sequence."""
    from transformers.masking_utils import causal_mask_function

    told: list[Any] = []
    with _record_mask_functions(told):
        base(input_ids=_make_token_ids(base, _TEST_LENGTHS[0])[None], use_cache=False)
    if any(function is not causal_mask_function for function in told):
        return "its masks are more than causal"
    return None


def _check_attention_kwargs(base: PreTrainedModel) -> str | None:
    """What is more than causal in what its layers tell their attention, or that some have another kind."""
    told: list[dict[str, Any]] = []

    def listening(*given: Any, **named: Any) -> tuple[torch.Tensor, None]:
        told.append(named)
        return causal_attention(*given, **named)

    documents = PackedSequences.from_lengths([1, 1], device=base.device)
    with mask_free_attention(base, listening):
        ids = _make_token_ids(base, 2)[None]
        base(input_ids=ids, position_ids=documents.position_ids, documents=documents, use_cache=False)
    if len(told) != base.config.num_hidden_layers or any(named.get("documents") is None for named in told):
        return "not all of its layers attend through transformers' interface"
    extra = {
        name
        for named in told
        for name, value in named.items()
        if value is not None and name not in _ALLOWED_ATTENTION_KWARGS
    }
    return f"its layers ask their attention for {', '.join(sorted(extra))}" if extra else None


def _check_sequence_isolation(base: PreTrainedModel) -> str | None:
    """Whether documents that share a row come out otherwise than each alone, as transformers has it."""
    if base.device.type == "meta":
        return None
    parts = _make_token_ids(base, sum(_TEST_LENGTHS)).split(_TEST_LENGTHS)
    alone = torch.cat([base(input_ids=part[None], use_cache=False).logits[0] for part in parts]).float()
    documents = PackedSequences.from_lengths(_TEST_LENGTHS, device=base.device)
    with mask_free_attention(base):
        together = (
            base(
                input_ids=torch.cat(parts)[None],
                position_ids=documents.position_ids,
                documents=documents,
                use_cache=False,
            )
            .logits[0]
            .float()
        )
    rounded = getattr(base, "is_quantized", False) or any(p.dtype != torch.float32 for p in base.parameters())
    if (together - alone).norm() > (_LOW_PRECISION_TOLERANCE if rounded else _FLOAT32_TOLERANCE) * alone.norm():
        return "documents that share a row come out otherwise than alone"
    return None


def _make_token_ids(base: PreTrainedModel, count: int) -> torch.Tensor:
    """Token ids, no two neighbours alike."""
    return (torch.arange(count, device=base.device) * 7 + 3) % int(base.config.vocab_size)


@contextmanager
def isolated_forward(base: PreTrainedModel) -> Iterator[None]:
    """Within it nothing is dropped out; after it each module has the attributes that it had before.

    Layers of bitsandbytes are left as in training: in evaluation those in four bits pack their weights anew on some
    CPUs, for good, and cannot be trained over any more. And they take the type that they compute in from the first
    input they see, which is to be a run's. Weights of more than one type (a head kept in bf16 over a trunk in float32)
    are multiplied in the lower one, as they are in a run.
    """
    from transformers.utils import generic

    before = [(module, dict(vars(module))) for module in base.modules()]
    for module, _ in before:
        module.training = type(module).__module__.startswith("bitsandbytes.")
    types = {parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()}
    try:
        several = torch.bfloat16 in types and len(types) > 1
        with generic.maybe_autocast(base.device.type, enabled=several, dtype=torch.bfloat16):
            yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
