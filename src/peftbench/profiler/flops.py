"""Compute model and hardware FLOPs of a step in closed form. A multiply-add is two FLOPs.

A forward pass of a few tokens lists a model's matrix products once: the cost of each per position (or per pair of query
and key), whether its weight is trained, and whether its input needs a gradient, according to autograd. This holds for
any length. In the backward pass, a product costs its forward FLOPs once for each operand that needs a gradient. Both
numbers follow from that list by multiplication:

- **Model FLOPs**: real and virtual tokens only, the causal half of attention, the head at labeled positions, no
  recomputation: what the method needs, independent of the implementation.
- **Hardware FLOPs**: all padded positions, the head at all computed positions, all pairs if a kernel does not skip
  masked ones, and recomputation by gradient checkpointing and by fused attention, whose backward pass is five products
  instead of four (Dao et al. 2022, arXiv:2205.14135, algorithm 4).

For a kernel that skips causally masked pairs, the lower triangle is counted, as its authors do (Dao 2023,
arXiv:2307.08691, section 4.1); the upper halves of the diagonal blocks, which it computes too, are not counted.

Two FLOPs per weight and token: Kaplan et al. 2020, arXiv:2001.08361. Model FLOPs include attention and exclude
recomputation: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from peftbench.common.attention import ATTENTION_NAME, is_fused_attention
from peftbench.data.collate import FlopUnits

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FlopUnit = Literal["position", "pair", "causal_pair", "label", "column", "row", "pass"]
_HARDWARE_ONLY = frozenset({"column", "row", "pass"})
"""Units of products that depend on the implementation, so that model FLOPs exclude them."""
_NUM_TRACE_TOKENS = 3  # tokens of the forward pass that lists the products


@dataclass(frozen=True)
class MatmulCost:
    """One matrix product of a forward pass, in FLOPs per ``unit``."""

    forward_flops: int
    backward_flops: int
    hardware_backward_flops: int
    unit: FlopUnit
    block_index: int | None = None
    """Index of the transformer block that contains it, which gradient checkpointing recomputes; None outside."""
    model_unit: FlopUnit | None = None
    """The unit for model FLOPs, if hardware FLOPs use another."""
    is_frozen: bool = False
    """True if it is in the frozen part of the model, whose states may be stored."""


def _get_unit_count(unit: FlopUnit, flop_units: FlopUnits) -> int:
    """Return the count of ``unit`` in ``flop_units``."""
    return {
        "position": flop_units.positions,
        "pair": flop_units.pairs,
        "causal_pair": flop_units.causal_pairs,
        "label": flop_units.labeled,
        "column": flop_units.columns,
        "row": flop_units.rows,
        "pass": flop_units.passes,
    }[unit]


@dataclass(frozen=True)
class FlopCost:
    """Forward and backward FLOPs of a model with one method."""

    matmuls: tuple[MatmulCost, ...]
    recomputed_matmuls: tuple[MatmulCost, ...] = ()
    """Products that gradient checkpointing recomputes."""

    def compute_model_flops(self, flop_units: FlopUnits) -> int:
        """Return the FLOPs that training needs: real positions, causal pairs, the head at labels."""
        return sum(
            (p.forward_flops + p.backward_flops) * _get_unit_count(p.model_unit or p.unit, flop_units)
            for p in self.matmuls
            if p.unit not in _HARDWARE_ONLY
        )

    def compute_hardware_flops(self, flop_units: FlopUnits, skipped: FlopUnits | None = None) -> int:
        """Return the FLOPs that training executes; ``skipped`` is the work that the frozen part skips."""
        once = sum(
            (p.forward_flops + p.hardware_backward_flops) * _get_unit_count(p.unit, flop_units) for p in self.matmuls
        )
        recomputed = sum(p.forward_flops * _get_unit_count(p.unit, flop_units) for p in self.recomputed_matmuls)
        if skipped is None:
            return once + recomputed
        frozen = (p for p in self.matmuls if p.is_frozen)
        return once + recomputed - sum(p.forward_flops * _get_unit_count(p.unit, skipped) for p in frozen)


class UnsupportedFlopsError(Exception):
    """A model computes something whose FLOPs are unknown."""


class NonLinearFlopsError(UnsupportedFlopsError):
    """A product does not scale with the positions: it has no closed form here, but FlopCounter can count it."""

    def __init__(self) -> None:
        super().__init__("a matrix product does not scale with the positions of a sequence")


_SUPPORTED_ATTENTION = frozenset({"sdpa", "eager", ATTENTION_NAME})
"""Attention implementations that use torch's kernels, which have formulas in ``flop_counter.py``."""


def count_flops(
    model: nn.Module,
    base_model: PreTrainedModel,
    *,
    virtual_tokens: int,
    gradient_checkpointing: bool,
    computes_all_logits: bool,
    compute_penalty: Callable[[], object] = lambda: None,
    frozen_modules: Sequence[nn.Module] = (),
) -> FlopCost:
    """List the matrix products of ``model``, which a method built from ``base_model``, in one short forward pass.

    ``computes_all_logits``: the head computes all positions in training, instead of only labeled ones.
    ``compute_penalty`` computes what the method adds to the loss of each micro-batch.
    ``frozen_modules`` are the modules of the frozen part, which have no backward pass.

    Raises:
        UnsupportedFlopsError: it has a kind of product that is unknown here.
    """
    if base_model.config._attn_implementation not in _SUPPORTED_ATTENTION:
        raise UnsupportedFlopsError(f"unknown attention implementation {base_model.config._attn_implementation}")
    trace = _MatmulTracer(
        base_model, _NUM_TRACE_TOKENS + virtual_tokens, head_unit="position" if computes_all_logits else "label"
    )
    tokens = torch.zeros((1, _NUM_TRACE_TOKENS), dtype=torch.long, device=next(model.parameters()).device)
    with (
        torch.enable_grad(),
        _track_blocks(base_model, trace),
        _track_frozen_modules(frozen_modules, trace),
        _record_quantized_layers(base_model, trace),
        trace,
    ):
        model(input_ids=tokens, use_cache=False)
        compute_penalty()
    return FlopCost(
        tuple(trace.iter_matmuls()), tuple(trace.iter_recomputed_matmuls()) if gradient_checkpointing else ()
    )


@contextmanager
def _track_blocks(base_model: PreTrainedModel, tracer: _MatmulTracer) -> Iterator[None]:
    """Set ``tracer.block_index`` while a block runs."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def set_block(number: int) -> Any:
        return lambda *_: setattr(tracer, "block_index", number)

    blocks = [module for module in base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [block.register_forward_pre_hook(set_block(number)) for number, block in enumerate(blocks)]
    handles += [block.register_forward_hook(lambda *_: setattr(tracer, "block_index", None)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _track_frozen_modules(modules: Sequence[nn.Module], tracer: _MatmulTracer) -> Iterator[None]:
    """Set ``tracer.is_frozen`` while one of ``modules`` runs."""

    def set_frozen(value: bool) -> Any:
        return lambda *_: setattr(tracer, "is_frozen", value)

    handles = [module.register_forward_pre_hook(set_frozen(True)) for module in modules]
    handles += [module.register_forward_hook(set_frozen(False)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _record_quantized_layers(base_model: PreTrainedModel, tracer: _MatmulTracer) -> Iterator[None]:
    """Record each bitsandbytes layer as one product, since its kernels differ between devices."""
    from torch import nn

    def record(layer: Any, inputs: Any) -> None:
        tracer.record_quantized_matmul(inputs[0], layer.in_features, layer.out_features)
        tracer.is_muted = True

    def unmute(*_: Any) -> None:
        tracer.is_muted = False

    layers = [
        m for m in base_model.modules() if isinstance(m, nn.Linear) and type(m).__module__.startswith("bitsandbytes.")
    ]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    handles += [layer.register_forward_hook(unmute) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Functions that save nothing for the backward pass. Recomputation stops after the last function that saves a tensor.
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
    "bilinear",
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
    "linalg_inv",
    "linalg_solve",
}


def _is_unsupported_matmul(func: Any, name: str) -> bool:
    """True if a function may be an unknown matrix product, by its torch name; all third-party kernels may be."""
    third_party = isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and "aten" not in str(func)
    return (
        third_party
        or name in _UNSUPPORTED_MATMULS
        or name.endswith("mm")
        or name.startswith("conv")
        or "attention" in name
    )


class _MatmulTracer(TorchFunctionMode):
    """Intercepts every call of a torch function and records matrix products."""

    def __init__(self, base_model: PreTrainedModel, num_positions: int, head_unit: FlopUnit) -> None:
        super().__init__()
        self.head_unit = head_unit
        head = base_model.get_output_embeddings()
        self.head_weight = None if head is None else head.weight
        self.num_positions = num_positions
        self.block_index: int | None = None
        self.is_frozen = False
        """True inside the frozen part."""
        self.is_muted = False
        """True inside a layer whose product is already recorded."""
        self._multiplied_weights: set[tuple[int | None, int, int]] = set()
        """Block and identities of two weights whose product is recorded."""
        self._recorded_calls: list[tuple[int | None, list[MatmulCost]]] = []
        """(block, its products) of every function that saves tensors for the backward pass or is a product."""
        self._last_saves: dict[int | None, int] = {}
        """Index of each block's last call that saves a tensor to compute a gradient; blocks without one are absent."""

    def iter_matmuls(self) -> Iterator[MatmulCost]:
        """Yield every product of the pass."""
        for _, products in self._recorded_calls:
            yield from products

    def iter_recomputed_matmuls(self) -> Iterator[MatmulCost]:
        """Yield the products that checkpointing recomputes: in each block, those before the last saved tensor."""
        if all(block is None for block, _ in self._recorded_calls):
            raise UnsupportedFlopsError("gradient checkpointing of a model without GradientCheckpointingLayer blocks")
        for index, (block, products) in enumerate(self._recorded_calls):
            if block is not None and index < self._last_saves.get(block, 0):
                yield from products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_muted:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        matmuls = self._find_matmuls(func, name, args, kwargs)
        if matmuls or (self.block_index is not None and not _saves_no_tensors(name, args, kwargs)):
            operands = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
            is_saving = any(p.backward_flops for p in matmuls) if matmuls else any(map(_needs_gradient, operands))
            self._record_call(matmuls, is_saving=is_saving)
        return func(*args, **kwargs)

    def record_quantized_matmul(self, inputs: torch.Tensor, in_features: int, out_features: int) -> None:
        """Record a product with a quantized weight, which is frozen and has no gradient."""
        if inputs.numel() // in_features != self.num_positions:
            raise NonLinearFlopsError
        forward = 2 * in_features * out_features
        backward = forward * _needs_gradient(inputs)
        cost = MatmulCost(forward, backward, backward, "position", self.block_index)
        self._record_call([cost], is_saving=backward > 0)

    def _record_call(self, matmuls: list[MatmulCost], *, is_saving: bool) -> None:
        """Record a call in the current block; ``is_saving``: it saves a tensor to compute a gradient."""
        if is_saving:
            self._last_saves[self.block_index] = len(self._recorded_calls)
        recorded = [replace(cost, is_frozen=True) for cost in matmuls] if self.is_frozen else matmuls
        self._recorded_calls.append((self.block_index, recorded))

    def _find_matmuls(self, func: Any, name: str, args: Any, kwargs: Any) -> list[MatmulCost]:
        builders: dict[str, Callable[..., MatmulCost]] = {
            "linear": lambda input, weight, *_, **__: self._build_linear_cost(input, weight, weight.shape[1]),
            "addmm": lambda _, inputs, weight, **__: self._build_linear_cost(inputs, weight, weight.shape[0]),
            "scaled_dot_product_attention": self._build_attention_cost,
            **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), self._build_matmul_cost),
            "baddbmm": lambda _, batch1, batch2, **__: self._build_matmul_cost(batch1, batch2),
            "_grouped_mm": self._build_expert_cost,
            "grouped_mm_fallback": partial(self._build_expert_cost, computes_all_gradients=True),
            "einsum": self._build_einsum_cost,
        }
        try:
            if name in builders:
                return [builders[name](*args, **kwargs)]
            if name == "conv1d":
                return self._build_convolution_costs(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise UnsupportedFlopsError(f"unknown arguments of {name}: {error}") from error
        if name == "tensordot":  # the counter sees its products
            raise NonLinearFlopsError
        if _is_unsupported_matmul(func, name):
            raise UnsupportedFlopsError(f"unknown matrix product {name}")
        return []

    def _build_linear_cost(self, inputs: torch.Tensor, weight: torch.Tensor, in_features: int) -> MatmulCost:
        if inputs.numel() // in_features != self.num_positions:
            raise NonLinearFlopsError
        is_head = weight is self.head_weight
        backward = 2 * weight.numel() * (_needs_gradient(inputs) + _needs_gradient(weight))
        per = self.head_unit if is_head else "position"
        return MatmulCost(2 * weight.numel(), backward, backward, per, self.block_index, "label" if is_head else None)

    def _build_attention_cost(  # noqa: PLR0917 — torch's signature
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> MatmulCost:
        if key.shape[-2] != query.shape[-2]:  # more keys than the sequence's own
            raise NonLinearFlopsError
        scores, mix = 2 * query.shape[1] * query.shape[-1], 2 * query.shape[1] * value.shape[-1]
        probabilities = _needs_gradient(query) or _needs_gradient(key)
        backward = scores * (_needs_gradient(query) + _needs_gradient(key)) + mix * (
            probabilities + _needs_gradient(value)
        )
        fused = 2 * (scores + mix) + scores if backward else 0  # recomputed scores, then four products
        plain = not is_fused_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)
        per: FlopUnit = "causal_pair" if is_causal and not plain else "pair"
        return MatmulCost(scores + mix, backward, backward if plain else fused, per, self.block_index, "causal_pair")

    def _build_matmul_cost(self, left: torch.Tensor, right: torch.Tensor, **_options: Any) -> MatmulCost:
        gradients = _needs_gradient(left) + _needs_gradient(right)
        if _is_weight(left) and _is_weight(right):
            return self._build_weight_product_cost(2 * left.numel() * right.shape[-1], left, right)
        if right.dim() == 2:
            return self._build_linear_cost(left, right, right.shape[0])
        *_, rows, inner = left.shape
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        total = 2 * math.prod(batch) * rows * inner * right.shape[-1]
        if inner == 1 and not gradients:  # angles of rotary embeddings: positions times frequencies
            return MatmulCost(total // self.num_positions, 0, 0, "column", self.block_index)
        if rows == self.num_positions and _is_weight(right):  # each expert computes all positions
            flops = total // self.num_positions
            return MatmulCost(flops, flops * gradients, flops * gradients, "position", self.block_index)
        if rows != self.num_positions or self.num_positions not in (inner, right.shape[-1]):
            raise NonLinearFlopsError
        flops = total // self.num_positions**2
        return MatmulCost(flops, flops * gradients, flops * gradients, "pair", self.block_index, "causal_pair")

    def _build_expert_cost(
        self,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        _offsets: torch.Tensor | None = None,
        *,
        computes_all_gradients: bool = False,
        **_: Any,
    ) -> MatmulCost:
        """Return the cost of rows (selected experts x positions, in) times stacked weights (experts, in, out).

        ``computes_all_gradients`` is True for a kernel that also computes gradients that are not needed.
        """
        if inputs.dim() != 2 or weights.dim() != 3 or inputs.shape[0] % self.num_positions:
            raise NonLinearFlopsError
        forward = 2 * inputs.numel() * weights.shape[-1] // self.num_positions
        backward = forward * (_needs_gradient(inputs) + _needs_gradient(weights))
        executed = 2 * forward if backward and computes_all_gradients else backward
        return MatmulCost(forward, backward, executed, "position", self.block_index)

    def _build_convolution_costs(  # noqa: PLR0917 — torch's signature
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
    ) -> list[MatmulCost]:
        """Return the cost of a causal convolution: for each position, and for the padding of each row."""
        (step,), (pad,), (gap,) = (
            value if isinstance(value, tuple) else (value,) for value in (stride, padding, dilation)
        )
        if step != 1 or inputs.shape[0] != 1 or inputs.shape[-1] != self.num_positions:
            raise NonLinearFlopsError
        forward = 2 * weight.numel()
        backward = forward * (_needs_gradient(inputs) + _needs_gradient(weight))
        extra = 2 * pad - gap * (weight.shape[-1] - 1)
        return [
            MatmulCost(forward, backward, backward, "position", self.block_index),
            MatmulCost(forward * extra, backward * extra, backward * extra, "row", self.block_index),
        ]

    def _build_einsum_cost(self, equation: str, *operands: torch.Tensor) -> MatmulCost:
        if len(operands) != 2 or not all(map(_is_weight, operands)):
            raise NonLinearFlopsError
        names = equation.replace(" ", "").partition("->")[0].split(",")
        sizes = dict(zip("".join(names), (size for weight in operands for size in weight.shape), strict=True))
        return self._build_weight_product_cost(2 * math.prod(sizes.values()), *operands)

    def _build_weight_product_cost(self, forward: int, left: torch.Tensor, right: torch.Tensor) -> MatmulCost:
        """Return the cost of a product of two weights, e.g. of LoRA's factors over stacked experts.

        peft multiplies these factors twice, first to check shapes; one of the two results has no backward pass.
        """
        factors = (self.block_index, id(_get_base(left)), id(_get_base(right)))
        is_repeated = factors in self._multiplied_weights
        self._multiplied_weights.add(factors)
        backward = 0 if is_repeated else forward * (_needs_gradient(left) + _needs_gradient(right))
        return MatmulCost(forward, backward, backward, "pass", self.block_index)


def _needs_gradient(tensor: torch.Tensor) -> bool:
    """True if autograd will compute a gradient for ``tensor``; a model may disable it for part of its forward pass."""
    return tensor.requires_grad and torch.is_grad_enabled()


def _get_base(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that ``tensor`` is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _is_weight(tensor: torch.Tensor) -> bool:
    """True for a parameter or a view of one, whose shape does not depend on the positions."""
    return isinstance(_get_base(tensor), torch.nn.Parameter)


def _saves_no_tensors(name: str, args: Any, kwargs: Any) -> bool:
    """True if a function saves nothing for the backward pass."""
    if name in {"mul", "__mul__", "__rmul__"}:  # times a number
        return not all(isinstance(factor, torch.Tensor) for factor in args[:2])
    if name == "dropout":
        probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        return probability == 0 or not training
    return name in _OPS_WITHOUT_SAVED_TENSORS
