"""Record the operations of a simulated step: one key per kind, shape and data type, with its count.

Counts grow linearly with the number of equal layers, so a model with fewer layers is enough (:func:`extrapolate`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.repetition import get_repetitions
from peftbench.timing.tensor_traffic import count_traffic, is_metadata_only, iter_list_items, list_tensors

OperationKind = Literal["product", "attention", "elementwise", "optimizer", "exchange", "metadata"]
OPERATION_KINDS: tuple[OperationKind, ...] = (
    "product",
    "attention",
    "elementwise",
    "optimizer",
    "exchange",
    "metadata",
)
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_TWO_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Products of two matrices: the index of the left one among the arguments."""
_COLLECTIVE_NAMESPACES = frozenset({"c10d", "_c10d_functional"})


class Operation(NamedTuple):
    """One kind of operation, reduced to what its time depends on."""

    part: str
    """Part of the step: forward, backward, optimizer or backward_and_optimizer."""
    kind: OperationKind
    name: str
    """torch's name, without namespace and overload."""
    dtype: str
    """Type of the first factor or of the result: fp32, bf16 or torch's name."""
    dims: tuple[int, ...] = ()
    """(batch, m, n, k) of a product, (batch x heads, queries, keys, width) of attention; else empty."""
    layout: str = ""
    """Layout of both factors: n for row by row, t for transposed, e.g. nt. Of attention: causal or full."""
    flops: int = 0
    nbytes: int = 0
    """Bytes read and written; of an exchange, bytes that this process sends."""
    is_launched: bool = True
    """False for one tensor of an operation on a list of tensors; a separate key counts the launch of the list."""


OperationCounts = Counter[Operation]


class OperationLog(TorchDispatchMode):
    """Counts the operations within, separately for each micro-batch and for the optimizer.

    ``counts`` may be taken after the block; ``device_type`` "cuda" leaves out operations on host tensors.
    """

    def __init__(self, get_step_part: Callable[[], str | None], device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._get_step_part = get_step_part
        self._device_type = device_type
        self._micro_batches: list[OperationCounts] = [Counter()]
        self._after_micro_batches: OperationCounts = Counter()
        self._part: str | None = None
        self._flop_counter = FlopCounter()

    def count_step(self, accumulation: int) -> OperationCounts:
        """Return the counts of a step with ``accumulation`` micro-batches; later ones repeat the last recorded one."""
        first, *later = [counts for counts in self._micro_batches if counts] or [OperationCounts()]
        total = Counter(first)
        for counts in later[: accumulation - 1]:
            total.update(counts)
        if (repeated := accumulation - 1 - len(later)) > 0:
            last = later[-1] if later else first
            total.update({operation: count * repeated for operation, count in last.items()})
        total.update(self._after_micro_batches)
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(cls, "to_local") for cls in types):  # DTensor first dispatches to the local shard
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._device_type == "cpu" or any(tensor.is_meta for tensor in list_tensors((args, kwargs, result))):
            counts = self._enter_part()
            for operation in self._describe(func, args, kwargs, result):
                counts[operation] += get_repetitions()
        return result

    def _enter_part(self) -> OperationCounts:
        """Return the counter of the current part; a forward pass after another part starts a micro-batch."""
        part = self._get_step_part()
        if part == "forward" and self._part not in {None, "forward"}:
            self._micro_batches.append(Counter())
        if part is not None:
            self._part = part
        return self._after_micro_batches if self._part == "optimizer" else self._micro_batches[-1]

    def _describe(self, func: Any, args: Any, kwargs: Any, result: Any) -> Iterator[Operation]:
        part, name = self._part or "forward", func._overloadpacket.__name__
        if func.namespace in _COLLECTIVE_NAMESPACES:
            yield Operation(part, "exchange", name, "", nbytes=_count_sent_bytes(name, args))
            return
        if is_metadata_only(func, name):
            yield Operation(part, "metadata", "view", "")
            return
        kind: OperationKind = "optimizer" if part == "optimizer" else "elementwise"
        items = list(iter_list_items(func, name, args, kwargs, result))
        if items:
            yield Operation(part, kind, name, "")
            for dtype, nbytes in items:
                yield Operation(part, kind, name, _name_dtype(dtype), nbytes=nbytes, is_launched=False)
            return
        traffic = count_traffic(func, name, args, kwargs, result)
        if func.namespace == "torch_attn":
            yield _describe_packed_attention(part, func, name, args, kwargs, traffic.nbytes)
            return
        flops = self._flop_counter.count_kernel_flops(func, args, kwargs, result)
        if not flops:
            yield Operation(part, kind, name, _name_dtype(traffic.dtype), nbytes=traffic.nbytes)
        elif "attention" in name:
            yield _describe_attention(part, func, name, args, kwargs, flops, traffic.nbytes)
        else:
            dims, layout, factor_dtype = _describe_factors(name, args, flops)
            yield Operation(part, "product", name, _name_dtype(factor_dtype), dims, layout, flops, traffic.nbytes)


def extrapolate(fewer: OperationCounts, more: OperationCounts, extra_units: int) -> OperationCounts:
    """Return the counts of a model with ``extra_units`` units of equal layers more than that of ``more``.

    ``fewer`` are the counts with one unit less than ``more``. A key that ``more`` lacks gets a negative count, so
    that totals of bytes, FLOPs and launches are exact.
    """
    counts = {key: more.get(key, 0) + extra_units * (more.get(key, 0) - fewer.get(key, 0)) for key in {**fewer, **more}}
    return Counter({key: count for key, count in counts.items() if count})


def sum_flops(counts: Mapping[Operation, int]) -> int:
    """Return the FLOPs of products and attention."""
    return sum(operation.flops * count for operation, count in counts.items())


def _name_dtype(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _describe_attention(part: str, func: Any, name: str, args: Any, kwargs: Any, flops: int, nbytes: int) -> Operation:
    """Return the operation of a fused attention kernel, forward or backward."""
    arguments = _name_arguments(func, args, kwargs)
    query, key = arguments["query"], arguments["key"]
    layout = "causal" if arguments.get("is_causal") else "full"
    rows, heads, queries, width = query.shape
    dims = (rows * heads, queries, key.shape[2], width)
    return Operation(part, "attention", name, _name_dtype(query.dtype), dims, layout, flops, nbytes)


def _describe_packed_attention(part: str, func: Any, name: str, args: Any, kwargs: Any, nbytes: int) -> Operation:
    """Return the operation of causal attention over sequences of equal length in one row.

    On the meta device their lengths have no values.
    """
    arguments = _name_arguments(func, args, kwargs)
    query, value = arguments["query"], arguments["value"]
    positions, heads, width = query.shape
    sequences = max(1, arguments["cu_seq_q"].shape[0] - 1)
    length = positions // sequences
    is_backward = "grad_out" in arguments
    products = 3 * width + 2 * value.shape[-1] if is_backward else width + value.shape[-1]
    flops = heads * sequences * length * (length + 1) * products
    dims = (sequences * heads, length, length, width)
    return Operation(part, "attention", name, _name_dtype(query.dtype), dims, "causal", flops, nbytes)


def _name_arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    named: dict[str, Any] = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    named.update(kwargs)
    return named


def _describe_factors(name: str, args: Any, flops: int) -> tuple[tuple[int, int, int, int], str, torch.dtype | None]:
    """Return (batch, m, n, k), layout and type of a product; for another kernel, a product of equal FLOPs and rows."""
    index = _TWO_FACTORS.get(name)
    tensors = [tensor for tensor in list_tensors(args) if tensor.dim() >= 2]
    if index is None:
        left = tensors[0]
        inner, rows = left.shape[-1], left.numel() // left.shape[-1]
        return (1, rows, max(1, flops // (2 * rows * inner)), inner), "nn", left.dtype
    left, right = args[index], args[index + 1]
    *batch, rows, inner = left.shape
    layout = _name_layout(left) + _name_layout(right)
    return (batch[0] if batch else 1, rows, right.shape[-1], inner), layout, left.dtype


def _name_layout(matrix: torch.Tensor) -> str:
    return "t" if matrix.stride(-1) != 1 and matrix.stride(-2) == 1 else "n"


def _count_sent_bytes(name: str, args: Any) -> int:
    """Return the bytes that one process sends, with the ring algorithm."""
    from torch import distributed

    size = distributed.get_world_size() if distributed.is_initialized() else 1
    tensors = list_tensors(args)
    total = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
    share = total * (size - 1) // size
    if "all_reduce" in name or "allreduce" in name:
        return 2 * share
    if "wait" in name or "barrier" in name:
        return 0
    return share if size > 1 else 0
