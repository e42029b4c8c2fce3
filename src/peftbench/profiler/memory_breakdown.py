"""Who holds the memory at its peak: every storage that torch makes is booked, with what it is for.

A ``TorchDispatchMode`` sees each operation's results, below autograd and in the backward pass too. A storage is booked
when it first comes out of an operation, and leaves the book when torch releases it. What it is for shows by what
happens to it, which may be later; so the book is read when the step is over.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftbench.profiler.memory import local_shard, iter_tensors

MemoryCategory = Literal[
    "weights", "gathered_weights", "weight_copies", "gradients", "buckets", "optimizer_state", "activations", "logits",
    "temporaries",
]  # fmt: skip
MEMORY_CATEGORIES: tuple[MemoryCategory, ...] = (
    "weights", "gathered_weights", "weight_copies", "gradients", "buckets", "optimizer_state", "activations", "logits",
    "temporaries",
)  # fmt: skip


@dataclass
class _TrackedStorage:
    """One storage: its size, and what it is for as far as that is known."""

    bytes: int
    kind: MemoryCategory = "temporaries"


@dataclass
class EngineBuffers:
    """What an engine keeps beside a model's parameters, between two steps."""

    tensors: list[tuple[MemoryCategory, torch.Tensor]] = field(default_factory=list)
    borrowed: list[nn.Parameter] = field(default_factory=list)
    """Parameters that are whole for a layer's time; their gradients are whole too."""
    bytes: list[tuple[MemoryCategory, int]] = field(default_factory=list)
    """Of what no tensor of Python's stands for."""
    steps: torch.optim.Optimizer | None = None
    """The optimizer that steps, within all that wraps it."""
    anew: Callable[[], Iterable[tuple[MemoryCategory, torch.Tensor]]] = tuple
    """Asked when something is sent: what an engine keeps that it makes anew in each step."""


@dataclass(frozen=True)
class MemoryEvent:
    """A storage is made or released."""

    storage: int
    """Number of the storage, from 0 in the order of time."""
    bytes: int
    made: bool
    kind: MemoryCategory
    operation: str
    part: str | None
    looked_at: bool
    """Whether it came after the mark."""


@dataclass(frozen=True)
class MemoryPeak:
    """The moment when most bytes were held."""

    bytes: int
    by_kind: dict[str, int]
    operation: str
    part: str | None


class MemoryTracker(TorchDispatchMode):
    """Books the storages of one step of training.

    - weights: parameters and buffers, of which a process may hold a part; gathered_weights: whole ones that it borrows
      for the time of a layer; weight_copies: those that autocast casts them into.
    - gradients: what ends in a parameter's ``grad``; buckets: what is sent to other processes or comes from them.
    - optimizer_state: what the optimizer keeps, float32 copies of the weights that it steps included.
    - logits: of the vocabulary's width, from the head's output to its gradient.
    - activations: made in the forward pass, or in its recomputation, and still there when the backward pass goes on.
    - temporaries: all others.

    What kernels allocate and release within one operation is not seen.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        vocabulary: int,
        part: Callable[[], str | None],
        *,
        holdings: Callable[[], EngineBuffers] = EngineBuffers,
        device: str | None = None,
    ) -> None:
        """``holdings`` are asked for when it begins to look. ``device`` is the kind whose memory is booked, None for
        every kind.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.optimizer = optimizer
        self.vocabulary = vocabulary
        self.part = part
        self.holdings = holdings
        self.device = device
        self._held: dict[int, _TrackedStorage] = {}
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._book: list[tuple[_TrackedStorage, int, str, str | None]] = []
        """(storage, +1 or -1, operation, part of the step), in the order of time."""
        self._mark = 0
        self._made_forward: dict[int, _TrackedStorage] = {}
        self._hooks: list[Any] = []
        self._patches = ExitStack()
        self._operation = ""
        self._anew = EngineBuffers().anew

    def mark(self) -> None:
        """Look for the peak in what comes from here on."""
        self._see_optimizer_state()  # of which not all comes out of operations
        for tensor in self.model.parameters():  # those that stay whole, which an engine may have made anew
            self._takes_over(local_shard(tensor), "weights", {"gathered_weights", "temporaries", "buckets"})
        self._mark = len(self._book)

    def events(self) -> Iterator[MemoryEvent]:
        """The book, in the order of time."""
        numbers: dict[int, int] = {}
        for index, (storage, sign, operation, part) in enumerate(self._book):
            number = numbers.setdefault(id(storage), len(numbers))
            yield MemoryEvent(number, storage.bytes, sign > 0, storage.kind, operation, part, index >= self._mark)

    def peak(self) -> MemoryPeak:
        """The largest sum of the book, after its mark."""
        by_kind: dict[str, int] = dict.fromkeys(MEMORY_CATEGORIES, 0)
        best = MemoryPeak(0, dict(by_kind), "", None)
        total = 0
        for index, (storage, sign, operation, part) in enumerate(self._book):
            by_kind[storage.kind] += sign * storage.bytes
            total += sign * storage.bytes
            if total > best.bytes and index >= self._mark:
                best = MemoryPeak(total, dict(by_kind), operation, part)
        return best

    def __enter__(self) -> MemoryTracker:
        held = self.holdings()
        self._anew = held.anew
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._see(local_shard(tensor), "weights")
            for more in iter_tensors([getattr(tensor, "quant_state", None)]):
                self._see(more, "weights")
        for kind, tensor in held.tensors:
            self._see(tensor, kind)
        for kind, size in held.bytes:
            self._book.append((_TrackedStorage(size, kind), 1, self._operation, self.part()))
        for parameter in (*self.model.parameters(), *held.borrowed):
            if parameter.grad is not None:
                self._see(local_shard(parameter.grad), "gradients")
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._is_gradient))
        if held.steps is not None:
            self._hooks.append(held.steps.register_step_pre_hook(self._see_gradients))
        self._see_optimizer_state()
        for parameter in held.borrowed:
            self._see(parameter, "gathered_weights")
        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", self._resizing()))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)  # type: ignore[no-untyped-call]
        self._patches.close()
        self._see_optimizer_state()
        for hook in self._hooks:
            hook.remove()
        self._watches.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):  # first what it comes to on this process's part
            return NotImplemented
        self._operation = str(func)
        backward = torch._C._current_graph_task_id() != -1
        if backward and not torch.is_grad_enabled():  # an operation of the backward pass, and not of a recomputation
            self._keep_for_backward()
        self._see_use(func, args)
        result = func(*args, **(kwargs or {}))
        copied = self._copies_a_weight(func, args)
        forward = self.part() == "forward" or (backward and torch.is_grad_enabled())
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see_result(tensor, copied=copied, forward=forward)
        return result

    def _see_result(self, tensor: torch.Tensor, *, copied: bool, forward: bool) -> None:
        storage = self._see(tensor, "weight_copies" if copied else "temporaries")
        if storage is None:
            return
        if storage.kind == "temporaries" and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            storage.kind = "logits"
        if forward and storage.kind == "temporaries":
            self._made_forward[id(storage)] = storage

    def _see_use(self, func: Any, args: Any) -> None:
        """What is computed with as a weight and is none that is held, is borrowed; what is sent is a bucket."""
        if func.namespace == "c10d":
            for tensor in tree_leaves(args):
                if isinstance(tensor, torch.Tensor):
                    self._takes_over(tensor, "buckets", {"temporaries", "gradients", "activations"})
            for kind, tensor in self._anew():
                self._takes_over(tensor, kind, {"temporaries", "gradients"})
        for tensor in args:
            if isinstance(tensor, nn.Parameter):
                self._takes_over(tensor, "gathered_weights", {"temporaries", "buckets", "activations"})

    def _takes_over(self, tensor: torch.Tensor, kind: MemoryCategory, before: set[MemoryCategory]) -> None:
        storage = _get_storage(tensor)
        booked = self._held.get(storage._cdata) if storage is not None else None
        if booked is not None and booked.kind in before:
            booked.kind = kind

    def _copies_a_weight(self, func: Any, args: Any) -> bool:
        if func is not torch.ops.aten._to_copy.default:
            return False
        storage = _get_storage(args[0])
        source = self._held.get(storage._cdata) if storage is not None else None
        return source is not None and source.kind in {"weights", "gathered_weights"}

    def _keep_for_backward(self) -> None:
        for storage in self._made_forward.values():
            if storage.kind == "temporaries":
                storage.kind = "activations"
        self._made_forward.clear()

    def _is_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._see(local_shard(parameter.grad), "gradients")

    def _see_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._see(local_shard(parameter.grad), "gradients")

    def _elsewhere(self, storage: torch.UntypedStorage) -> bool:
        return self.device is not None and storage.device.type != self.device

    def _see_optimizer_state(self) -> None:
        groups = (
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        )
        for state in (*self.optimizer.state.values(), *groups):
            for tensor in iter_tensors(state.values()):
                self._see(tensor, "optimizer_state")

    def _see(self, tensor: torch.Tensor, kind: MemoryCategory) -> _TrackedStorage | None:
        """The booked storage of ``tensor``, new or known; a known one takes over a kind that says more."""
        storage = _get_storage(tensor)
        if storage is None or self._elsewhere(storage):
            return None
        key = storage._cdata
        booked = self._held.get(key)
        if booked is None:
            booked = self._held[key] = _TrackedStorage(storage.nbytes(), kind)
            self._book.append((booked, 1, self._operation, self.part()))
            self._watches[key] = weakref.ref(storage, partial(self._released, key))
        elif kind in {"gradients", "optimizer_state"}:
            booked.kind = kind
        return booked

    def _resizing(self) -> Callable[[torch.UntypedStorage, int], Any]:
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        return resized

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """One that is given memory or gives it back and stays: to the book it is another one, for the same."""
        if self._elsewhere(storage):
            return
        key = storage._cdata
        before = self._held.pop(key, None)
        if before is None:
            self._watches[key] = weakref.ref(storage, partial(self._released, key))
        else:
            self._made_forward.pop(id(before), None)
            self._book.append((before, -1, self._operation, self.part()))
        after = self._held[key] = _TrackedStorage(storage.nbytes(), before.kind if before else "temporaries")
        self._book.append((after, 1, self._operation, self.part()))

    def _released(self, key: int, _: object) -> None:
        storage = self._held.pop(key)
        self._watches.pop(key, None)
        self._made_forward.pop(id(storage), None)
        self._book.append((storage, -1, self._operation, self.part()))


def _get_storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Where the tensor's elements lie, None where it has no storage of its own (a wrapper of others)."""
    if hasattr(tensor, "to_local"):  # whose own is a name for the whole, which is nowhere
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
