"""FLOPs: what a step requires, and what it executes, in closed form. A multiplication and an addition are two.

A model's matrix products are listed once, from a forward pass of a few tokens: what each costs for one position (or for
one pair of query and key), whether its weight is trained, and whether a gradient must reach its input, which autograd
itself says and which holds for any length. Backward, a product costs its forward once more for each of its two operands
that needs a gradient. Both figures follow from that list by multiplication:

- **required**: real and virtual tokens only, the causal half of attention, the head at labelled positions, nothing
  recomputed: what the mathematics of the method needs, whatever the implementation.
- **executed**: every padded position, the head wherever it is computed, all pairs where a kernel does not skip those
  that are masked, and what is computed twice: by gradient checkpointing, and by fused attention, whose backward pass is
  five products and not four (Dao et al. 2022, arXiv:2205.14135, algorithm 4).

Of a kernel that skips what is causally masked the lower triangle is counted, as its authors do (Dao 2023,
arXiv:2307.08691, section 4.1); blocks on the diagonal, which it computes whole, are not.

Two FLOPs for each weight and token: Kaplan et al. 2020, arXiv:2001.08361. Attention is counted and recomputation is not
part of what is required: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from peftbench.data.collate import FlopUnits

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FlopUnit = Literal["position", "pair", "causal_pair", "label", "column"]
_NUM_TRACE_TOKENS = 3  # of the pass that lists products


@dataclass(frozen=True)
class MatmulCost:
    """One matrix product of a forward pass, in FLOPs for one unit of ``per``."""

    forward: int
    backward: int
    executed_backward: int
    per: FlopUnit
    block: int | None = None
    """Number of the block (from 0) that gradient checkpointing computes again, None outside of blocks."""
    required_per: FlopUnit | None = None
    """The unit by which it is required, where more is computed."""


def _get_unit_count(per: FlopUnit, work: FlopUnits) -> int:
    """How often ``work`` has the unit."""
    return {
        "position": work.positions, "pair": work.pairs, "causal_pair": work.causal_pairs, "label": work.labelled,
        "column": work.columns,
    }[per]  # fmt: skip


@dataclass(frozen=True)
class FlopCost:
    """A model's FLOPs, forward and backward, under one method."""

    products: tuple[MatmulCost, ...]
    recomputed: tuple[MatmulCost, ...] = ()
    """What gradient checkpointing computes once more."""

    def required(self, work: FlopUnits) -> int:
        """FLOPs that training on ``work`` needs: real positions, causal pairs, the head at labels."""
        return sum(
            (p.forward + p.backward) * _get_unit_count(p.required_per or p.per, work)
            for p in self.products if p.per != "column"
        )  # fmt: skip

    def executed(self, work: FlopUnits) -> int:
        """FLOPs that ``work`` takes."""
        once = sum((p.forward + p.executed_backward) * _get_unit_count(p.per, work) for p in self.products)
        return once + sum(p.forward * _get_unit_count(p.per, work) for p in self.recomputed)


class UnsupportedFlopsError(Exception):
    """A model computes something whose FLOPs are not known here."""


class NonLinearFlopsError(UnsupportedFlopsError):
    """A product that does not grow with the positions: no closed form here, but torch's counter sees it."""

    def __init__(self) -> None:
        super().__init__("a product over something else than the positions of a sequence")


_SUPPORTED_ATTENTION = frozenset({"sdpa", "eager", "peftbench_causal"})
"""Attention whose kernels are torch's own, with formulas in ``counter.py``."""


def count_flops(
    model: nn.Module, base: PreTrainedModel, *, virtual_tokens: int, checkpointing: bool, head_everywhere: bool
) -> FlopCost:
    """List the products of ``model``, which a method made from ``base``, in one forward pass of a few tokens.

    ``head_everywhere``: in training the head computes all positions, and not the labelled ones alone.

    Raises:
        UncountableError: it has products of a kind that is not known here.
    """
    if base.config._attn_implementation not in _SUPPORTED_ATTENTION:
        raise UnsupportedFlopsError(f"attention as {base.config._attn_implementation}")
    trace = _MatmulTracer(base, _NUM_TRACE_TOKENS + virtual_tokens, head_per="position" if head_everywhere else "label")
    tokens = torch.zeros((1, _NUM_TRACE_TOKENS), dtype=torch.long, device=next(model.parameters()).device)
    with torch.enable_grad(), _track_blocks(base, trace), _record_quantized_layers(base, trace), trace:
        model(input_ids=tokens, use_cache=False)
    return FlopCost(tuple(trace.products()), tuple(trace.recomputed()) if checkpointing else ())


@contextmanager
def _track_blocks(base: PreTrainedModel, trace: _Trace) -> Iterator[None]:
    """Tell ``trace`` which block is computed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def entered(number: int) -> Any:
        return lambda *_: setattr(trace, "block", number)

    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [block.register_forward_pre_hook(entered(number)) for number, block in enumerate(blocks)]
    handles += [block.register_forward_hook(lambda *_: setattr(trace, "block", None)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _record_quantized_layers(base: PreTrainedModel, trace: _Trace) -> Iterator[None]:
    """Note the products of bitsandbytes' layers as one each: inside are kernels that differ between devices."""
    from torch import nn

    def entered(layer: Any, inputs: Any) -> None:
        trace.note_quantised(inputs[0], layer.in_features, layer.out_features)
        trace.muted = True

    def left(*_: Any) -> None:
        trace.muted = False

    layers = [m for m in base.modules() if isinstance(m, nn.Linear) and type(m).__module__.startswith("bitsandbytes.")]
    handles = [layer.register_forward_pre_hook(entered) for layer in layers]
    handles += [layer.register_forward_hook(left) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Functions that keep nothing for the backward pass: only what comes before the last one that does is computed again.
_OPS_WITHOUT_SAVED_TENSORS = {
    "add", "add_", "__add__", "__iadd__", "__radd__", "__get__", "view", "reshape", "transpose", "permute",
    "contiguous", "size", "dim", "split", "unsqueeze", "expand", "to", "detach", "is_floating_point", "requires_grad_",
}  # fmt: skip
_UNSUPPORTED_MATMULS = {
    "einsum", "bilinear", "tensordot", "mv", "addmv", "dot", "inner", "outer", "ger", "addr", "vdot", "multi_dot",
    "chain_matmul", "multi_head_attention_forward", "cdist",
}  # fmt: skip


def _is_unsupported_matmul(func: Any, name: str) -> bool:
    """Whether a function is a product that is not known here, by what torch calls such; kernels of others all are."""
    foreign = isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and "aten" not in str(func)
    return foreign or name in _UNSUPPORTED_MATMULS or name.endswith("mm") or name.startswith("conv") or "attention" in name


class _MatmulTracer(TorchFunctionMode):
    """Sees every function of torch that is called, and notes the products."""

    def __init__(self, base: PreTrainedModel, width: int, head_per: FlopUnit) -> None:
        super().__init__()
        self.head_per = head_per
        head = base.get_output_embeddings()
        self.head = None if head is None else head.weight
        self.width = width
        self.block: int | None = None
        self.muted = False
        """Whether what is called belongs to a product that is noted already."""
        self._seen: list[tuple[int | None, list[MatmulCost]]] = []
        """(block, its products) of every function that keeps something for the backward pass or is a product."""

    def products(self) -> Iterator[MatmulCost]:
        """Every product of the pass."""
        for _, products in self._seen:
            yield from products

    def recomputed(self) -> Iterator[MatmulCost]:
        """What checkpointing computes again: in each block, products before the last function that keeps anything."""
        if all(block is None for block, _ in self._seen):
            raise UnsupportedFlopsError("gradient checkpointing of a model without blocks that transformers knows")
        last = {block: index for index, (block, _) in enumerate(self._seen)}
        for index, (block, products) in enumerate(self._seen):
            needed = any(p.backward for b, found in self._seen if b == block for p in found)
            if block is not None and needed and index < last[block]:
                yield from products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.muted:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        found = self._products(func, name, args, kwargs)
        if found or (self.block is not None and not _saves_no_tensors(name, args, kwargs)):
            self._seen.append((self.block, found))
        return func(*args, **kwargs)

    def note_quantised(self, inputs: torch.Tensor, width_in: int, width_out: int) -> None:
        """A product with a quantised weight, which is never trained and keeps nothing that autograd knows of."""
        if inputs.numel() // width_in != self.width:
            raise NonLinearFlopsError
        forward = 2 * width_in * width_out
        backward = forward * inputs.requires_grad
        self._seen.append((self.block, [MatmulCost(forward, backward, backward, "position", self.block)]))

    def _products(self, func: Any, name: str, args: Any, kwargs: Any) -> list[MatmulCost]:
        if func is functional.linear:
            return [self._linear(args[0], args[1], args[1].shape[1])]
        if name == "addmm":
            return [self._linear(args[1], args[2], args[2].shape[0])]
        if func is functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            return [self._attention(query, key, value, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False))]
        if name in {"matmul", "__matmul__", "mm", "bmm"}:
            return [self._matmul(args[0], args[1])]
        if _is_unsupported_matmul(func, name):
            raise UnsupportedFlopsError(f"{name} is no product that is known here")
        return []

    def _linear(self, inputs: torch.Tensor, weight: torch.Tensor, width: int) -> MatmulCost:
        if inputs.numel() // width != self.width:
            raise NonLinearFlopsError
        is_head = weight is self.head
        backward = 2 * weight.numel() * (inputs.requires_grad + weight.requires_grad)
        per = self.head_per if is_head else "position"
        return MatmulCost(2 * weight.numel(), backward, backward, per, self.block, "label" if is_head else None)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool
    ) -> MatmulCost:
        scores, mix = 2 * query.shape[1] * query.shape[-1], 2 * query.shape[1] * value.shape[-1]
        probabilities = query.requires_grad or key.requires_grad
        backward = scores * (query.requires_grad + key.requires_grad) + mix * (probabilities + value.requires_grad)
        fused = 2 * (scores + mix) + scores if backward else 0  # the scores once more, then four products
        # With dropout of probabilities, attention on CPU is not fused (torch's sdp_utils_cpp.cpp).
        plain = query.device.type == "cpu" and dropout > 0
        per: FlopUnit = "causal_pair" if causal and not plain else "pair"
        return MatmulCost(scores + mix, backward, backward if plain else fused, per, self.block, "causal_pair")

    def _matmul(self, left: torch.Tensor, right: torch.Tensor) -> MatmulCost:
        gradients = left.requires_grad + right.requires_grad
        if right.dim() == 2:
            return self._linear(left, right, right.shape[0])
        *_, rows, inner = left.shape
        total = 2 * left.numel() * right.shape[-1]
        if inner == 1 and not gradients:  # angles of rotary embeddings: positions times frequencies
            return MatmulCost(total // self.width, 0, 0, "column", self.block)
        if rows != self.width or self.width not in (inner, right.shape[-1]):
            raise NonLinearFlopsError
        flops = total // (left.shape[0] * self.width**2)
        return MatmulCost(flops, flops * gradients, flops * gradients, "pair", self.block, "causal_pair")


def _saves_no_tensors(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a function leaves nothing for the backward pass."""
    if name in {"mul", "__mul__", "__rmul__"}:  # by a number
        return not all(isinstance(factor, torch.Tensor) for factor in args[:2])
    if name == "dropout":
        probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        return probability == 0 or not training
    return name in _OPS_WITHOUT_SAVED_TENSORS
