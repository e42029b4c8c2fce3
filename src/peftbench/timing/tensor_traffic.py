"""Count the bytes that an operation reads and writes, from its schema and the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

_NO_DATA = frozenset(
    {
        "_local_scalar_dense",
        "_reshape_alias",
        "_unsafe_view",
        "detach",
        "detach_",
        "empty",
        "empty_like",
        "empty_strided",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "set_",
    }
)
"""Operations that move no data, besides views."""
_WRITES_FIRST = frozenset({"bernoulli_", "copy_", "exponential_", "fill_", "normal_", "random_", "uniform_", "zero_"})
"""Operations that overwrite their first argument without reading it."""
_GATHERS = frozenset({"embedding", "gather", "index", "index_select", "nll_loss_forward", "take_along_dim"})
"""Operations that read as many values of their first argument as they return."""
_SCATTERS = frozenset({"index_add_", "index_copy_", "index_put_", "_index_put_impl_", "scatter_", "scatter_add_"})
"""Operations that change as many values of their first argument as the largest other argument has."""


class Traffic(NamedTuple):
    """Bytes read and written by one operation, and the type of its result."""

    nbytes: int
    dtype: torch.dtype | None


def list_tensors(values: Any) -> list[torch.Tensor]:
    """Return the tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def count_distinct_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, with expanded dimensions counted once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride or not size) * tensor.element_size()


def is_metadata_only(func: Any, name: str) -> bool:
    """True for a view, an allocation without a value, and a read of one value."""
    if name in _NO_DATA:
        return True
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def count_traffic(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> Traffic:
    """Return the bytes that an operation reads and writes: each input, each changed input and each new result once."""
    schema_args = func._schema.arguments
    named = [(schema_args[i], value) for i, value in enumerate(args[: len(schema_args)])]
    by_name = {argument.name: argument for argument in schema_args}
    named += [(by_name[key], value) for key, value in kwargs.items() if key in by_name]
    read, changed, sizes = 0, 0, []
    for index, (argument, value) in enumerate(named):
        nbytes = sum(count_distinct_bytes(tensor) for tensor in list_tensors(value))
        sizes.append(nbytes)
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        changed += nbytes if is_changed else 0
        is_output = argument.kwarg_only and is_changed
        if not (is_output or (index == 0 and name in _WRITES_FIRST)):
            read += nbytes
    results = [
        tensor
        for returned, value in zip(func._schema.returns, _as_sequence(func, result), strict=False)
        if returned.alias_info is None
        for tensor in list_tensors(value)
    ]
    written = sum(count_distinct_bytes(tensor) for tensor in results)
    if name in _GATHERS:
        read = min(read, read - sizes[0] + written)
    if name in _SCATTERS:
        others = max(sizes[1:], default=0)
        read, changed = read - sizes[0] + others, others
    first = next(iter([*results, *list_tensors((args, kwargs))]), None)
    return Traffic(read + changed + written, None if first is None else first.dtype)


def _as_sequence(func: Any, result: Any) -> Any:
    return result if len(func._schema.returns) > 1 else (result,)


def iter_list_items(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> Iterator[tuple[torch.dtype, int]]:
    """Yield type and bytes for each tensor of an operation on lists (foreach, fused optimizers); else nothing."""
    if not name.startswith(("_foreach_", "_fused_")):
        return
    lists: list[tuple[list[torch.Tensor], int]] = []
    by_name = {argument.name: argument for argument in func._schema.arguments}
    values = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    for key, value in (*values, *kwargs.items()):
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            is_changed = by_name[key].alias_info is not None and by_name[key].alias_info.is_write
            is_unread = key == "self" and name in {"_foreach_zero_", "_foreach_copy_"}
            # A fused optimizer changes its gradients only to unscale them.
            times = 1 if key == "grads" or not is_changed or is_unread else 2
            lists.append((list(value), times))
    if isinstance(result, (list, tuple)) and result and isinstance(result[0], torch.Tensor):
        lists.append((list(result), 1))
    if not lists:
        return
    count = len(lists[0][0])
    full = [(tensors, times) for tensors, times in lists if len(tensors) == count]
    for index in range(count):
        nbytes = sum(times * count_distinct_bytes(tensors[index]) for tensors, times in full)
        yield lists[0][0][index].dtype, nbytes
