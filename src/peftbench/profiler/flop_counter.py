"""FLOPs as they are really dispatched: torch's formulas for its kernels, and those for kernels it does not know.

Torch's own ``FlopCounterMode`` also takes operations apart that have no formula (the derivative of SiLU, say), and then
rounds otherwise than without it. An instrument must not change what it measures, so this one only looks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of every matrix product dispatched within, backward passes and recomputation included."""

    def __init__(self, is_excluded: Callable[[], bool] = lambda: False) -> None:
        """``aside`` tells of what is not to be counted: products of an optimizer, say."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_excluded = is_excluded
        self.total_flops: int | None = 0
        """None once a kernel was given what its formula does not know."""
        self._formulas = flop_registry | {kernel: shape_wrapper(formula) for kernel, formula in _list_extra_formulas()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.total_flops is not None and not self._is_excluded():
            try:
                self.total_flops += self._count_kernel_flops(func, args, kwargs, result)
            except Exception:  # of a version or a shape that is not known here; the step must go on
                self.total_flops = None
        return result

    def _count_kernel_flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Of one kernel, 0 where it multiplies no matrices."""
        formula = self._formulas.get(func._overloadpacket)
        if func.namespace != "torch_attn" and formula is None:
            return 0
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if func.namespace == "torch_attn":
            return _varlen_attention_flop(given)
        flops = int(formula(*args, **kwargs, out_val=result))  # type: ignore[misc]
        # Formulas count all pairs; a causal kernel skips those above the diagonal.
        queries, keys = (given["query"].shape[-2], given["key"].shape[-2]) if given.get("is_causal") else (0, None)
        return flops * (queries + 1) // (2 * queries) if queries == keys else flops


def _varlen_attention_flop(arguments: dict[str, Any]) -> int:
    """Attention over documents of unlike lengths, causal: query, key and value are (positions, heads, width)."""
    pairs = sum(length * (length + 1) // 2 for length in arguments["cu_seq_q"].diff().tolist())
    (_, heads, width), mixed = arguments["query"].shape, arguments["value"].shape[-1]
    products = 3 * width + 2 * mixed if "grad_out" in arguments else width + mixed
    return int(2 * heads * pairs * products)


def _list_extra_formulas() -> list[tuple[Any, Any]]:
    """Kernels that torch would count as nothing, with formulas over the shapes of their arguments."""
    aten = torch.ops.aten
    known: list[tuple[Any, Any]] = [
        (aten._scaled_dot_product_flash_attention_for_cpu, _cpu_sdpa_flop),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, _cpu_sdpa_backward_flop),
        (aten.addmm_, _addmm_flop),
        (aten.addmm, _addmm_flop),  # torch's own takes no type to sum in
    ]
    if sys.modules.get("bitsandbytes") is not None:  # its kernels are torch's to call once it was imported
        formulas = {
            "gemm_4bit": _packed_mm_flop,
            "gemv_4bit": _packed_mm_flop,
            "int8_linear_matmul": _int8_mm_flop,
            "int8_scaled_mm": _int8_mm_flop,
            "int8_mixed_scaled_mm": _mixed_int8_mm_flop,
        }
        kernels = torch.ops.bitsandbytes  # another version may lack one
        known += [(getattr(kernels, name), formula) for name, formula in formulas.items() if hasattr(kernels, name)]
    return known


def _addmm_flop(_into: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


def _int8_mm_flop(inputs: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of inputs (..., in) with weights (out, in); all arguments are shapes."""
    return int(2 * math.prod(inputs) * weight[0])


def _packed_mm_flop(inputs: Any, _packed: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of inputs (..., in) with four-bit weights that unpacked are (out, in)."""
    return _int8_mm_flop(inputs, weight)


def _mixed_int8_mm_flop(_inputs: Any, quantized: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of quantised inputs (..., in) with weights (out, in). The few columns that stay in 16 bits are not known here."""
    return _int8_mm_flop(quantized, weight)


def _cpu_sdpa_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, queries, width = query
    return int(2 * rows * heads * queries * key[2] * (width + value[3]))


def _cpu_sdpa_backward_flop(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, queries, width = query
    # Scores once more, their gradient to query and key; and to the probabilities and the value.
    return int(2 * rows * heads * queries * key[2] * (3 * width + 2 * value[3]))
