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

from peftbench.common.attention import ATTENTION_NAME
from peftbench.data.collate import FlopUnits

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FlopUnit = Literal["position", "pair", "causal_pair", "label", "column"]
_NUM_TRACE_TOKENS = 3  # of the pass that lists products


@dataclass(frozen=True)
class MatmulCost:
    """One matrix product of a forward pass, in FLOPs for one unit of ``per``."""

    forward_flops: int
    backward_flops: int
    hardware_backward_flops: int
    unit: FlopUnit
    block_index: int | None = None
    """Number of the block (from 0) that gradient checkpointing computes again, None outside of blocks."""
    model_unit: FlopUnit | None = None
    """The unit by which it is required, where more is computed."""


def _get_unit_count(unit: FlopUnit, flop_units: FlopUnits) -> int:
    """How often ``work`` has the unit."""
    return {
        "position": flop_units.positions,
        "pair": flop_units.pairs,
        "causal_pair": flop_units.causal_pairs,
        "label": flop_units.labelled,
        "column": flop_units.columns,
    }[unit]


@dataclass(frozen=True)
class FlopCost:
    """A model's FLOPs, forward and backward, under one method."""

    matmuls: tuple[MatmulCost, ...]
    recomputed_matmuls: tuple[MatmulCost, ...] = ()
    """What gradient checkpointing computes once more."""

    def compute_model_flops(self, flop_units: FlopUnits) -> int:
        """FLOPs that training on ``work`` needs: real positions, causal pairs, the head at labels."""
        return sum(
            (p.forward_flops + p.backward_flops) * _get_unit_count(p.model_unit or p.unit, flop_units)
            for p in self.matmuls
            if p.unit != "column"
        )

    def compute_hardware_flops(self, flop_units: FlopUnits) -> int:
        """FLOPs that ``work`` takes."""
        once = sum(
            (p.forward_flops + p.hardware_backward_flops) * _get_unit_count(p.unit, flop_units) for p in self.matmuls
        )
        return once + sum(p.forward_flops * _get_unit_count(p.unit, flop_units) for p in self.recomputed_matmuls)


class UnsupportedFlopsError(Exception):
    """A model computes something whose FLOPs are not known here."""


class NonLinearFlopsError(UnsupportedFlopsError):
    """A product that does not grow with the positions: no closed form here, but torch's counter sees it."""

    def __init__(self) -> None:
        super().__init__("a product over something else than the positions of a sequence")


_SUPPORTED_ATTENTION = frozenset({"sdpa", "eager", ATTENTION_NAME})
"""Attention whose kernels are torch's own, with formulas in ``counter.py``."""


def count_flops(
    model: nn.Module,
    base_model: PreTrainedModel,
    *,
    virtual_tokens: int,
    gradient_checkpointing: bool,
    computes_all_logits: bool,
) -> FlopCost:
    """List the products of ``model``, which a method made from ``base``, in one forward pass of a few tokens.

    ``head_everywhere``: in training the head computes all positions, and not the labelled ones alone.

    Raises:
        UncountableError: it has products of a kind that is not known here.
    """
    if base_model.config._attn_implementation not in _SUPPORTED_ATTENTION:
        raise UnsupportedFlopsError(f"attention as {base_model.config._attn_implementation}")
    trace = _MatmulTracer(
        base_model, _NUM_TRACE_TOKENS + virtual_tokens, head_unit="position" if computes_all_logits else "label"
    )
    tokens = torch.zeros((1, _NUM_TRACE_TOKENS), dtype=torch.long, device=next(model.parameters()).device)
    with torch.enable_grad(), _track_blocks(base_model, trace), _record_quantized_layers(base_model, trace), trace:
        model(input_ids=tokens, use_cache=False)
    return FlopCost(
        tuple(trace.iter_matmuls()), tuple(trace.iter_recomputed_matmuls()) if gradient_checkpointing else ()
    )


@contextmanager
def _track_blocks(base_model: PreTrainedModel, tracer: _MatmulTracer) -> Iterator[None]:
    """Tell ``trace`` which block is computed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def entered(number: int) -> Any:
        return lambda *_: setattr(tracer, "block_index", number)

    blocks = [module for module in base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [block.register_forward_pre_hook(entered(number)) for number, block in enumerate(blocks)]
    handles += [block.register_forward_hook(lambda *_: setattr(tracer, "block_index", None)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _record_quantized_layers(base_model: PreTrainedModel, tracer: _MatmulTracer) -> Iterator[None]:
    """Note the products of bitsandbytes' layers as one each: inside are kernels that differ between devices."""
    from torch import nn

    def entered(layer: Any, inputs: Any) -> None:
        tracer.record_quantized_matmul(inputs[0], layer.in_features, layer.out_features)
        tracer.is_muted = True

    def left(*_: Any) -> None:
        tracer.is_muted = False

    layers = [
        m for m in base_model.modules() if isinstance(m, nn.Linear) and type(m).__module__.startswith("bitsandbytes.")
    ]
    handles = [layer.register_forward_pre_hook(entered) for layer in layers]
    handles += [layer.register_forward_hook(left) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Functions that keep nothing for the backward pass: only what comes before the last one that does is computed again.
_OPS_WITHOUT_SAVED_TENSORS = {
    "add",
    "add_",
    "__add__",
    "__iadd__",
    "__radd__",
    "__get__",
    "view",
    "reshape",
    "transpose",
    "permute",
    "contiguous",
    "size",
    "dim",
    "split",
    "unsqueeze",
    "expand",
    "to",
    "detach",
    "is_floating_point",
    "requires_grad_",
}
_UNSUPPORTED_MATMULS = {
    "einsum",
    "bilinear",
    "tensordot",
    "mv",
    "addmv",
    "dot",
    "inner",
    "outer",
    "ger",
    "addr",
    "vdot",
    "multi_dot",
    "chain_matmul",
    "multi_head_attention_forward",
    "cdist",
}


def _is_unsupported_matmul(func: Any, name: str) -> bool:
    """Whether a function is a product that is not known here, by what torch calls such; kernels of others all are."""
    foreign = isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and "aten" not in str(func)
    return (
        foreign or name in _UNSUPPORTED_MATMULS or name.endswith("mm") or name.startswith("conv") or "attention" in name
    )


class _MatmulTracer(TorchFunctionMode):
    """Sees every function of torch that is called, and notes the products."""

    def __init__(self, base_model: PreTrainedModel, num_positions: int, head_unit: FlopUnit) -> None:
        super().__init__()
        self.head_unit = head_unit
        head = base_model.get_output_embeddings()
        self.head_weight = None if head is None else head.weight
        self.num_positions = num_positions
        self.block_index: int | None = None
        self.is_muted = False
        """Whether what is called belongs to a product that is noted already."""
        self._recorded_calls: list[tuple[int | None, list[MatmulCost]]] = []
        """(block, its products) of every function that keeps something for the backward pass or is a product."""

    def iter_matmuls(self) -> Iterator[MatmulCost]:
        """Every product of the pass."""
        for _, products in self._recorded_calls:
            yield from products

    def iter_recomputed_matmuls(self) -> Iterator[MatmulCost]:
        """What checkpointing computes again: in each block, products before the last function that keeps anything."""
        if all(block is None for block, _ in self._recorded_calls):
            raise UnsupportedFlopsError("gradient checkpointing of a model without blocks that transformers knows")
        last = {block: index for index, (block, _) in enumerate(self._recorded_calls)}
        for index, (block, products) in enumerate(self._recorded_calls):
            needed = any(p.backward_flops for b, found in self._recorded_calls if b == block for p in found)
            if block is not None and needed and index < last[block]:
                yield from products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_muted:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        found = self._find_matmuls(func, name, args, kwargs)
        if found or (self.block_index is not None and not _saves_no_tensors(name, args, kwargs)):
            self._recorded_calls.append((self.block_index, found))
        return func(*args, **kwargs)

    def record_quantized_matmul(self, inputs: torch.Tensor, in_features: int, out_features: int) -> None:
        """A product with a quantised weight, which is never trained and keeps nothing that autograd knows of."""
        if inputs.numel() // in_features != self.num_positions:
            raise NonLinearFlopsError
        forward = 2 * in_features * out_features
        backward = forward * inputs.requires_grad
        self._recorded_calls.append(
            (self.block_index, [MatmulCost(forward, backward, backward, "position", self.block_index)])
        )

    def _find_matmuls(self, func: Any, name: str, args: Any, kwargs: Any) -> list[MatmulCost]:
        if func is functional.linear:
            return [self._build_linear_cost(args[0], args[1], args[1].shape[1])]
        if name == "addmm":
            return [self._build_linear_cost(args[1], args[2], args[2].shape[0])]
        if func is functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            return [
                self._build_attention_cost(
                    query, key, value, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
                )
            ]
        if name in {"matmul", "__matmul__", "mm", "bmm"}:
            return [self._build_matmul_cost(args[0], args[1])]
        if _is_unsupported_matmul(func, name):
            raise UnsupportedFlopsError(f"{name} is no product that is known here")
        return []

    def _build_linear_cost(self, inputs: torch.Tensor, weight: torch.Tensor, in_features: int) -> MatmulCost:
        if inputs.numel() // in_features != self.num_positions:
            raise NonLinearFlopsError
        is_head = weight is self.head_weight
        backward = 2 * weight.numel() * (inputs.requires_grad + weight.requires_grad)
        per = self.head_unit if is_head else "position"
        return MatmulCost(2 * weight.numel(), backward, backward, per, self.block_index, "label" if is_head else None)

    def _build_attention_cost(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool
    ) -> MatmulCost:
        scores, mix = 2 * query.shape[1] * query.shape[-1], 2 * query.shape[1] * value.shape[-1]
        probabilities = query.requires_grad or key.requires_grad
        backward = scores * (query.requires_grad + key.requires_grad) + mix * (probabilities + value.requires_grad)
        fused = 2 * (scores + mix) + scores if backward else 0  # the scores once more, then four products
        # With dropout of probabilities, attention on CPU is not fused (torch's sdp_utils_cpp.cpp).
        plain = query.device.type == "cpu" and dropout_p > 0
        per: FlopUnit = "causal_pair" if is_causal and not plain else "pair"
        return MatmulCost(scores + mix, backward, backward if plain else fused, per, self.block_index, "causal_pair")

    def _build_matmul_cost(self, left: torch.Tensor, right: torch.Tensor) -> MatmulCost:
        gradients = left.requires_grad + right.requires_grad
        if right.dim() == 2:
            return self._build_linear_cost(left, right, right.shape[0])
        *_, rows, inner = left.shape
        total = 2 * left.numel() * right.shape[-1]
        if inner == 1 and not gradients:  # angles of rotary embeddings: positions times frequencies
            return MatmulCost(total // self.num_positions, 0, 0, "column", self.block_index)
        if rows != self.num_positions or self.num_positions not in (inner, right.shape[-1]):
            raise NonLinearFlopsError
        flops = total // (left.shape[0] * self.num_positions**2)
        return MatmulCost(flops, flops * gradients, flops * gradients, "pair", self.block_index, "causal_pair")


def _saves_no_tensors(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a function leaves nothing for the backward pass."""
    if name in {"mul", "__mul__", "__rmul__"}:  # by a number
        return not all(isinstance(factor, torch.Tensor) for factor in args[:2])
    if name == "dropout":
        probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        return probability == 0 or not training
    return name in _OPS_WITHOUT_SAVED_TENSORS
