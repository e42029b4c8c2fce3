"""Check whether a base model can attend without masks, by running short forward passes, not by a list of names.

Three checks: the masks that transformers would build are purely causal; the layers pass their attention no argument
that changes which keys a query sees; and two packed sequences give the same logits as each alone. The last one fails
for recurrent state, for positions counted across the row and for layers of another kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from peftbench.common.text import first_line
from peftbench.data.collate import PackedSequences
from peftbench.modeling.attention import causal_attention, mask_free_attention, use_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALLOWED_ATTENTION_KWARGS = frozenset(
    {
        "dropout",
        "scaling",
        "is_causal",
        "packed_sequences",
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "layer_idx",
    }
)
"""Arguments that do not change which keys a query attends to."""
_LENGTH_DEPENDENT_ROPE_TYPES = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies depend on the longest sequence of a forward pass."""
_TEST_LENGTHS = (5, 4)
_FLOAT32_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-3, 5e-2
"""Maximum difference between packed and separate logits, relative to their norm: in float32, and in fewer bits."""


@torch.no_grad()
def find_mask_free_blocker(base: PreTrainedModel) -> str | None:
    """Return why a base model needs masks, None if it does not.

    Call it before the engine casts the model to fewer bits. On the meta device, which has no values, packed sequences
    are not compared.
    """
    implementation = base.config._attn_implementation
    replaces_flash = implementation == "flash_attention_2" and base._supports_sdpa
    if implementation != "sdpa" and not replaces_flash:
        return f"its attention is {implementation}"
    rotary = getattr(base.config, "rope_parameters", None) or getattr(base.config, "rope_scaling", None) or {}
    types = {rotary.get("rope_type")} | {rope.get("rope_type") for rope in rotary.values() if isinstance(rope, dict)}
    if blocking := types & _LENGTH_DEPENDENT_ROPE_TYPES:
        return f"its {blocking.pop()} rotary embeddings depend on the longest sequence"
    try:
        with isolated_forward(base), use_attention(base, "sdpa"):
            return _check_masks(base) or _check_attention_kwargs(base) or _check_sequence_isolation(base)
    except Exception as error:  # model code may fail in any way on an unknown argument; it then keeps its masks
        return f"it does not accept packed sequences ({first_line(error, max_length=100)})"


@contextmanager
def _record_mask_functions(mask_functions: list[Any]) -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def recorder(*args: Any, **kwargs: Any) -> Any:
        mask_functions.append(kwargs.get("mask_function"))
        return original(*args, **kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", recorder)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", original)


def _check_masks(base: PreTrainedModel) -> str | None:
    """Return a reason if transformers would build more than a causal mask for one sequence."""
    from transformers.masking_utils import causal_mask_function

    mask_functions: list[Any] = []
    with _record_mask_functions(mask_functions):
        base(input_ids=_make_token_ids(base, _TEST_LENGTHS[0])[None], use_cache=False)
    if any(function is not causal_mask_function for function in mask_functions):
        return "its masks are more than causal"
    return None


def _check_attention_kwargs(base: PreTrainedModel) -> str | None:
    """Return a reason if a layer passes its attention more than causal attention needs, or does not use it."""
    calls: list[dict[str, Any]] = []

    def recorder(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        calls.append(kwargs)
        return causal_attention(*args, **kwargs)

    packed = PackedSequences.from_lengths([1, 1], device=base.device)
    with mask_free_attention(base, recorder):
        ids = _make_token_ids(base, 2)[None]
        base(input_ids=ids, position_ids=packed.position_ids, packed_sequences=packed, use_cache=False)
    if len(calls) != base.config.num_hidden_layers or any(kwargs.get("packed_sequences") is None for kwargs in calls):
        return "not all of its layers attend through transformers' interface"
    extra = {
        name
        for kwargs in calls
        for name, value in kwargs.items()
        if value is not None and name not in _ALLOWED_ATTENTION_KWARGS
    }
    return f"its layers pass their attention {', '.join(sorted(extra))}" if extra else None


def _check_sequence_isolation(base: PreTrainedModel) -> str | None:
    """Return a reason if packed sequences give other logits than each sequence alone in transformers."""
    if base.device.type == "meta":
        return None
    parts = _make_token_ids(base, sum(_TEST_LENGTHS)).split(_TEST_LENGTHS)
    separate = torch.cat([base(input_ids=part[None], use_cache=False).logits[0] for part in parts]).float()
    packed = PackedSequences.from_lengths(_TEST_LENGTHS, device=base.device)
    with mask_free_attention(base):
        packed_logits = (
            base(
                input_ids=torch.cat(parts)[None],
                position_ids=packed.position_ids,
                packed_sequences=packed,
                use_cache=False,
            )
            .logits[0]
            .float()
        )
    low_precision = getattr(base, "is_quantized", False) or any(p.dtype != torch.float32 for p in base.parameters())
    tolerance = _LOW_PRECISION_TOLERANCE if low_precision else _FLOAT32_TOLERANCE
    if (packed_logits - separate).norm() > tolerance * separate.norm():
        return "packed sequences give other logits than separate ones"
    return None


def _make_token_ids(base: PreTrainedModel, count: int) -> torch.Tensor:
    """Return token ids in which no two neighbors are equal."""
    return (torch.arange(count, device=base.device) * 7 + 3) % int(base.config.vocab_size)


@contextmanager
def isolated_forward(base: PreTrainedModel) -> Iterator[None]:
    """Disable dropout inside the context, and restore every module's attributes after it.

    bitsandbytes layers stay in training mode: in evaluation mode, 4-bit layers permanently repack their weights on some
    CPUs and can no longer be trained over. They also take their compute dtype from the first input they see, which must
    be the run's, so attributes are restored. Weights in 16 bits are multiplied in them,
    as in a run.
    """
    from transformers.utils import generic

    saved = [(module, dict(vars(module))) for module in base.modules()]
    for module, _ in saved:
        module.training = type(module).__module__.startswith("bitsandbytes.")
    dtypes = {parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()}
    try:
        low = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)
        with generic.maybe_autocast(base.device.type, enabled=low is not None, dtype=low or torch.bfloat16):
            yield
    finally:
        for module, attributes in saved:
            vars(module).clear()
            vars(module).update(attributes)
