"""Count dispatched FLOPs with torch's formulas, plus formulas for kernels that torch does not know.

torch's own ``FlopCounterMode`` also decomposes operations without a formula (e.g. the derivative of SiLU), and this
changes the rounding. An instrument must not change what it measures, so this one does not decompose.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from peftbench.profiler.repetition import get_repetitions


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of every matrix product dispatched within, backward passes and recomputation included."""

    def __init__(self, is_excluded: Callable[[], bool] = lambda: False) -> None:
        """``is_excluded`` returns True while nothing is counted, e.g. in an optimizer step."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_excluded = is_excluded
        self.total_flops: int | None = 0
        """None after a formula failed on a kernel's arguments."""
        self._formulas = flop_registry | {kernel: shape_wrapper(formula) for kernel, formula in _list_extra_formulas()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.total_flops is not None and not self._is_excluded():
            try:
                self.total_flops += self.count_kernel_flops(func, args, kwargs, result) * get_repetitions()
            except Exception:  # unknown version or shape; the step must not fail
                self.total_flops = None
        return result

    def count_kernel_flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Return the FLOPs of one kernel, 0 if it is not a matrix product."""
        formula = self._formulas.get(func._overloadpacket)
        if func.namespace != "torch_attn" and formula is None:
            return 0
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if func.namespace == "torch_attn":
            return _varlen_attention_flop(arguments)
        flops = int(formula(*args, **kwargs, out_val=result))  # type: ignore[misc]
        # Formulas count all pairs; a causal kernel skips those above the diagonal.
        queries, keys = (
            (arguments["query"].shape[-2], arguments["key"].shape[-2]) if arguments.get("is_causal") else (0, None)
        )
        return flops * (queries + 1) // (2 * queries) if queries == keys else flops


def _varlen_attention_flop(arguments: dict[str, Any]) -> int:
    """Return the FLOPs of causal varlen attention; query, key and value are (positions, heads, width)."""
    pairs = sum(length * (length + 1) // 2 for length in arguments["cu_seq_q"].diff().tolist())
    (_, heads, width), mixed = arguments["query"].shape, arguments["value"].shape[-1]
    products = 3 * width + 2 * mixed if "grad_out" in arguments else width + mixed
    return int(2 * heads * pairs * products)


def _list_extra_formulas() -> list[tuple[Any, Any]]:
    """Return kernels that torch would not count, with formulas over their arguments' shapes."""
    aten = torch.ops.aten
    formulas_by_kernel: list[tuple[Any, Any]] = [
        (aten._scaled_dot_product_flash_attention_for_cpu, _cpu_sdpa_flop),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, _cpu_sdpa_backward_flop),
        (aten.addmm_, _addmm_flop),
        (aten.addmm, _addmm_flop),  # torch's formula rejects out_dtype
        (aten._grouped_mm, _grouped_mm_flop),
        *_list_fallback_formulas(),
        (aten.convolution_backward, _convolution_backward_flop),  # torch's formula ignores groups
    ]
    if sys.modules.get("bitsandbytes") is not None:  # importing it registers its kernels
        formulas = {
            "gemm_4bit": _packed_mm_flop,
            "gemv_4bit": _packed_mm_flop,
            "int8_linear_matmul": _int8_mm_flop,
            "int8_scaled_mm": _int8_mm_flop,
            "int8_mixed_scaled_mm": _mixed_int8_mm_flop,
        }
        kernels = torch.ops.bitsandbytes  # some versions lack one
        formulas_by_kernel += [
            (getattr(kernels, name), formula) for name, formula in formulas.items() if hasattr(kernels, name)
        ]
    return formulas_by_kernel


def _addmm_flop(_into: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


def _list_fallback_formulas() -> list[tuple[Any, Any]]:
    """Return formulas of the loops over experts that transformers runs where torch has no grouped product."""
    if sys.modules.get("transformers.integrations.moe") is None:
        return []
    kernels = torch.ops.transformers
    return [
        (kernels.grouped_mm_fallback, _grouped_mm_flop),
        (kernels.grouped_mm_fallback_backward, _grouped_mm_backward_flop),
    ]


def _grouped_mm_backward_flop(inputs: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of both gradients: of inputs (rows, in) and of stacked weights (experts, in, out)."""
    return int(2 * 2 * math.prod(inputs) * weight[-1])


def _grouped_mm_flop(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of a product in groups of the rows of ``left``, or of the inner dimension of two matrices."""
    if len(left) != 2:
        raise ValueError("groups of the columns of the right side, or a batch")
    return int(2 * math.prod(left) * right[-1])


def _convolution_backward_flop(
    grad_output: Any,
    inputs: Any,
    weight: Any,
    _bias_sizes: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: Any,
    _output_padding: Any,
    _groups: Any,
    output_mask: Any,
    **_: Any,
) -> int:
    """Return the FLOPs of the gradients of inputs and weight (out, in / groups, kernel) of a convolution."""
    rows, _channels, *positions = inputs if transposed else grad_output
    return int(2 * rows * math.prod(positions) * math.prod(weight) * sum(output_mask[:2]))


def _int8_mm_flop(inputs: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of inputs (..., in) times weights (out, in); all arguments are shapes."""
    return int(2 * math.prod(inputs) * weight[0])


def _packed_mm_flop(inputs: Any, _packed: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of inputs (..., in) times packed 4-bit weights of shape (out, in)."""
    return _int8_mm_flop(inputs, weight)


def _mixed_int8_mm_flop(_inputs: Any, quantized: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of int8 inputs (..., in) times weights (out, in), without the few 16-bit outlier columns."""
    return _int8_mm_flop(quantized, weight)


def _cpu_sdpa_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, queries, width = query
    return int(2 * rows * heads * queries * key[2] * (width + value[3]))


def _cpu_sdpa_backward_flop(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, queries, width = query
    # Recomputed scores and the gradients of query and key; gradients of probabilities and value.
    return int(2 * rows * heads * queries * key[2] * (3 * width + 2 * value[3]))
