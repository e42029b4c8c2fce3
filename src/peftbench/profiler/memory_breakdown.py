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

from peftbench.profiler.memory import iter_tensors, local_shard

MemoryCategory = Literal[
    "weights",
    "gathered_weights",
    "weight_copies",
    "gradients",
    "buckets",
    "optimizer_state",
    "activations",
    "logits",
    "temporaries",
]
MEMORY_CATEGORIES: tuple[MemoryCategory, ...] = (
    "weights",
    "gathered_weights",
    "weight_copies",
    "gradients",
    "buckets",
    "optimizer_state",
    "activations",
    "logits",
    "temporaries",
)


@dataclass
class _TrackedStorage:
    """One storage: its size, and what it is for as far as that is known."""

    nbytes: int
    category: MemoryCategory = "temporaries"


@dataclass
class EngineBuffers:
    """What an engine keeps beside a model's parameters, between two steps."""

    tensors: list[tuple[MemoryCategory, torch.Tensor]] = field(default_factory=list)
    gathered: list[nn.Parameter] = field(default_factory=list)
    """Parameters that are whole for a layer's time; their gradients are whole too."""
    untracked_bytes: list[tuple[MemoryCategory, int]] = field(default_factory=list)
    """Of what no tensor of Python's stands for."""
    inner_optimizer: torch.optim.Optimizer | None = None
    """The optimizer that steps, within all that wraps it."""
    refresh: Callable[[], Iterable[tuple[MemoryCategory, torch.Tensor]]] = tuple
    """Asked when something is sent: what an engine keeps that it makes anew in each step."""


@dataclass(frozen=True)
class MemoryEvent:
    """A storage is made or released."""

    storage_id: int
    """Number of the storage, from 0 in the order of time."""
    nbytes: int
    is_allocation: bool
    category: MemoryCategory
    operation: str
    step_part: str | None
    is_after_mark: bool
    """Whether it came after the mark."""


@dataclass(frozen=True)
class MemoryPeak:
    """The moment when most bytes were held."""

    nbytes: int
    bytes_by_category: dict[str, int]
    operation: str
    step_part: str | None


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
        vocab_size: int,
        get_step_part: Callable[[], str | None],
        *,
        get_engine_buffers: Callable[[], EngineBuffers] = EngineBuffers,
        device_type: str | None = None,
    ) -> None:
        """``holdings`` are asked for when it begins to look. ``device`` is the kind whose memory is booked, None for
        every kind.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.optimizer = optimizer
        self.vocab_size = vocab_size
        self.get_step_part = get_step_part
        self.get_engine_buffers = get_engine_buffers
        self.device_type = device_type
        self._live_storages: dict[int, _TrackedStorage] = {}
        self._release_watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._event_log: list[tuple[_TrackedStorage, int, str, str | None]] = []
        """(storage, +1 or -1, operation, part of the step), in the order of time."""
        self._mark_index = 0
        self._forward_storages: dict[int, _TrackedStorage] = {}
        self._hooks: list[Any] = []
        self._patches = ExitStack()
        self._operation = ""
        self._refresh = EngineBuffers().refresh

    def mark(self) -> None:
        """Look for the peak in what comes from here on."""
        self._track_optimizer_state()  # of which not all comes out of operations
        for tensor in self.model.parameters():  # those that stay whole, which an engine may have made anew
            self._reassign(local_shard(tensor), "weights", {"gathered_weights", "temporaries", "buckets"})
        self._mark_index = len(self._event_log)

    def iter_events(self) -> Iterator[MemoryEvent]:
        """The book, in the order of time."""
        numbers: dict[int, int] = {}
        for index, (storage, sign, operation, part) in enumerate(self._event_log):
            number = numbers.setdefault(id(storage), len(numbers))
            yield MemoryEvent(
                number, storage.nbytes, sign > 0, storage.category, operation, part, index >= self._mark_index
            )

    def find_peak(self) -> MemoryPeak:
        """The largest sum of the book, after its mark."""
        by_kind: dict[str, int] = dict.fromkeys(MEMORY_CATEGORIES, 0)
        best = MemoryPeak(0, dict(by_kind), "", None)
        total = 0
        for index, (storage, sign, operation, part) in enumerate(self._event_log):
            by_kind[storage.category] += sign * storage.nbytes
            total += sign * storage.nbytes
            if total > best.nbytes and index >= self._mark_index:
                best = MemoryPeak(total, dict(by_kind), operation, part)
        return best

    def __enter__(self) -> MemoryTracker:
        held = self.get_engine_buffers()
        self._refresh = held.refresh
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._track(local_shard(tensor), "weights")
            for more in iter_tensors([getattr(tensor, "quant_state", None)]):
                self._track(more, "weights")
        for kind, tensor in held.tensors:
            self._track(tensor, kind)
        for kind, size in held.untracked_bytes:
            self._event_log.append((_TrackedStorage(size, kind), 1, self._operation, self.get_step_part()))
        for parameter in (*self.model.parameters(), *held.gathered):
            if parameter.grad is not None:
                self._track(local_shard(parameter.grad), "gradients")
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._track_parameter_gradient))
        if held.inner_optimizer is not None:
            self._hooks.append(held.inner_optimizer.register_step_pre_hook(self._track_optimizer_gradients))
        self._track_optimizer_state()
        for parameter in held.gathered:
            self._track(parameter, "gathered_weights")
        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", self._build_tracked_resize()))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)  # type: ignore[no-untyped-call]
        self._patches.close()
        self._track_optimizer_state()
        for hook in self._hooks:
            hook.remove()
        self._release_watches.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):  # first what it comes to on this process's part
            return NotImplemented
        self._operation = str(func)
        backward = torch._C._current_graph_task_id() != -1
        if backward and not torch.is_grad_enabled():  # an operation of the backward pass, and not of a recomputation
            self._mark_activations()
        self._reclassify_inputs(func, args)
        result = func(*args, **(kwargs or {}))
        copied = self._is_weight_copy(func, args)
        forward = self.get_step_part() == "forward" or (backward and torch.is_grad_enabled())
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._track_result(tensor, is_weight_copy=copied, is_forward=forward)
        return result

    def _track_result(self, tensor: torch.Tensor, *, is_weight_copy: bool, is_forward: bool) -> None:
        storage = self._track(tensor, "weight_copies" if is_weight_copy else "temporaries")
        if storage is None:
            return
        if storage.category == "temporaries" and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
            storage.category = "logits"
        if is_forward and storage.category == "temporaries":
            self._forward_storages[id(storage)] = storage

    def _reclassify_inputs(self, func: Any, args: Any) -> None:
        """What is computed with as a weight and is none that is held, is borrowed; what is sent is a bucket."""
        if func.namespace == "c10d":
            for tensor in tree_leaves(args):
                if isinstance(tensor, torch.Tensor):
                    self._reassign(tensor, "buckets", {"temporaries", "gradients", "activations"})
            for kind, tensor in self._refresh():
                self._reassign(tensor, kind, {"temporaries", "gradients"})
        for tensor in args:
            if isinstance(tensor, nn.Parameter):
                self._reassign(tensor, "gathered_weights", {"temporaries", "buckets", "activations"})

    def _reassign(self, tensor: torch.Tensor, category: MemoryCategory, from_categories: set[MemoryCategory]) -> None:
        storage = _get_storage(tensor)
        booked = self._live_storages.get(storage._cdata) if storage is not None else None
        if booked is not None and booked.category in from_categories:
            booked.category = category

    def _is_weight_copy(self, func: Any, args: Any) -> bool:
        if func is not torch.ops.aten._to_copy.default:
            return False
        storage = _get_storage(args[0])
        source = self._live_storages.get(storage._cdata) if storage is not None else None
        return source is not None and source.category in {"weights", "gathered_weights"}

    def _mark_activations(self) -> None:
        for storage in self._forward_storages.values():
            if storage.category == "temporaries":
                storage.category = "activations"
        self._forward_storages.clear()

    def _track_parameter_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._track(local_shard(parameter.grad), "gradients")

    def _track_optimizer_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._track(local_shard(parameter.grad), "gradients")

    def _is_on_other_device(self, storage: torch.UntypedStorage) -> bool:
        return self.device_type is not None and storage.device.type != self.device_type

    def _track_optimizer_state(self) -> None:
        groups = (
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        )
        for state in (*self.optimizer.state.values(), *groups):
            for tensor in iter_tensors(state.values()):
                self._track(tensor, "optimizer_state")

    def _track(self, tensor: torch.Tensor, category: MemoryCategory) -> _TrackedStorage | None:
        """The booked storage of ``tensor``, new or known; a known one takes over a kind that says more."""
        storage = _get_storage(tensor)
        if storage is None or self._is_on_other_device(storage):
            return None
        key = storage._cdata
        booked = self._live_storages.get(key)
        if booked is None:
            booked = self._live_storages[key] = _TrackedStorage(storage.nbytes(), category)
            self._event_log.append((booked, 1, self._operation, self.get_step_part()))
            self._release_watches[key] = weakref.ref(storage, partial(self._on_release, key))
        elif category in {"gradients", "optimizer_state"}:
            booked.category = category
        return booked

    def _build_tracked_resize(self) -> Callable[[torch.UntypedStorage, int], Any]:
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._on_resize(storage)
            return result

        return resized

    def _on_resize(self, storage: torch.UntypedStorage) -> None:
        """One that is given memory or gives it back and stays: to the book it is another one, for the same."""
        if self._is_on_other_device(storage):
            return
        key = storage._cdata
        before = self._live_storages.pop(key, None)
        if before is None:
            self._release_watches[key] = weakref.ref(storage, partial(self._on_release, key))
        else:
            self._forward_storages.pop(id(before), None)
            self._event_log.append((before, -1, self._operation, self.get_step_part()))
        after = self._live_storages[key] = _TrackedStorage(
            storage.nbytes(), before.category if before else "temporaries"
        )
        self._event_log.append((after, 1, self._operation, self.get_step_part()))

    def _on_release(self, key: int, _: object) -> None:
        storage = self._live_storages.pop(key)
        self._release_watches.pop(key, None)
        self._forward_storages.pop(id(storage), None)
        self._event_log.append((storage, -1, self._operation, self.get_step_part()))


def _get_storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Where the tensor's elements lie, None where it has no storage of its own (a wrapper of others)."""
    if hasattr(tensor, "to_local"):  # whose own is a name for the whole, which is nowhere
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
