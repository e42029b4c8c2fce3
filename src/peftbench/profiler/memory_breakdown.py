"""Break down peak memory by category: every storage that torch allocates is tracked with its purpose.

A ``TorchDispatchMode`` sees the results of each operation below autograd, including the backward pass. A storage is
tracked from the first operation that returns it until torch releases it. Its category may follow only from a later
operation, so the event log is read after the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftbench.profiler.layer_tags import LayerTags
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
    """One storage: its size, and its category as far as known."""

    nbytes: int
    category: MemoryCategory = "temporaries"
    layer: int | None = None
    """Tag of the layer that allocated it."""


@dataclass
class EngineBuffers:
    """Tensors that an engine keeps between steps in addition to the model's parameters."""

    tensors: list[tuple[MemoryCategory, torch.Tensor]] = field(default_factory=list)
    gathered: list[nn.Parameter] = field(default_factory=list)
    """Parameters that are gathered while a layer runs; their gradients are unsharded too."""
    untracked_bytes: list[tuple[MemoryCategory, int]] = field(default_factory=list)
    """Memory without a Python tensor, e.g. buffers of a C++ reducer."""
    inner_optimizer: torch.optim.Optimizer | None = None
    """The innermost optimizer, inside all wrappers."""
    refresh: Callable[[], Iterable[tuple[MemoryCategory, torch.Tensor]]] = tuple
    """Called at each collective; returns buffers that the engine allocates again in each step."""


class MemoryEvent(NamedTuple):
    """A storage is allocated or released."""

    storage_id: int
    """Number of the storage, from 0 in order of allocation."""
    nbytes: int
    is_allocation: bool
    category: MemoryCategory
    operation: str
    step_part: str | None
    is_after_mark: bool
    """True after the call of :meth:`MemoryTracker.mark`."""
    layer: int | None = None
    """Tag of the layer whose operation this is; None outside of layers."""


class _LoggedEvent(NamedTuple):
    """A change of a storage whose category may not be known yet."""

    storage: _TrackedStorage
    sign: int
    """1 for an allocation, -1 for a release."""
    operation: str
    step_part: str | None
    layer: int | None


@dataclass(frozen=True)
class MemoryPeak:
    """The moment with the most live bytes."""

    nbytes: int
    bytes_by_category: dict[str, int]
    operation: str
    step_part: str | None


class MemoryTracker(TorchDispatchMode):
    """Tracks the storages of one training step.

    - weights: parameters and buffers, or the process's shards of them; gathered_weights: unsharded parameters while a
      layer runs; weight_copies: autocast's casts of them.
    - gradients: storages that become a parameter's ``grad``; buckets: storages sent or received by collectives.
    - optimizer_state: tensors in the optimizer's and in the method's state, including float32 master weights.
    - logits: tensors of the vocabulary's width, from the head's output to its gradient.
    - activations: created in the forward pass or its recomputation, and still live in the backward pass.
    - temporaries: all others.

    Memory that a kernel allocates and releases within one operation is not seen.
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
        list_method_tensors: Callable[[], Iterable[torch.Tensor]] = tuple,
        layers: LayerTags | None = None,
    ) -> None:
        """``get_engine_buffers`` is called on entry. Only storages on ``device_type`` are tracked, None for all.

        ``list_method_tensors`` returns the tensors that the method keeps between steps; a step may replace them.
        ``layers`` tags the events of layers.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.optimizer = optimizer
        self.vocab_size = vocab_size
        self.get_step_part = get_step_part
        self.get_engine_buffers = get_engine_buffers
        self.device_type = device_type
        self.list_method_tensors = list_method_tensors
        self._live_storages: dict[int, _TrackedStorage] = {}
        self._release_watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.layers = layers or LayerTags()
        self._event_log: list[_LoggedEvent] = []
        """All changes in the order of time."""
        self._mark_index = 0
        self._forward_storages: dict[int, _TrackedStorage] = {}
        self._hooks: list[Any] = []
        self._patches = ExitStack()
        self._operation = ""
        self._input_layer: int | None = None
        """Tag of the running operation's inputs, for operations outside of layers."""
        self._is_in_optimizer = False
        self._refresh = EngineBuffers().refresh

    def mark(self) -> None:
        """Search for the peak only in later events."""
        self._track_optimizer_state()  # some states are not the result of an operation
        for tensor in self.model.parameters():  # an engine may have reallocated unsharded ones
            self._reassign(local_shard(tensor), "weights", {"gathered_weights", "temporaries", "buckets"})
        self._mark_index = len(self._event_log)

    def iter_events(self) -> Iterator[MemoryEvent]:
        """Yield all events in order of time."""
        numbers: dict[int, int] = {}
        for index, (storage, sign, operation, part, layer) in enumerate(self._event_log):
            number = numbers.setdefault(id(storage), len(numbers))
            is_after_mark = index >= self._mark_index
            yield MemoryEvent(number, storage.nbytes, sign > 0, storage.category, operation, part, is_after_mark, layer)

    def find_peak(self) -> MemoryPeak:
        """Return the peak of live bytes after the mark."""
        by_category: dict[str, int] = dict.fromkeys(MEMORY_CATEGORIES, 0)
        best = MemoryPeak(0, dict(by_category), "", None)
        total = 0
        for index, (storage, sign, operation, part, _) in enumerate(self._event_log):
            by_category[storage.category] += sign * storage.nbytes
            total += sign * storage.nbytes
            if total > best.nbytes and index >= self._mark_index:
                best = MemoryPeak(total, dict(by_category), operation, part)
        return best

    def __enter__(self) -> MemoryTracker:
        buffers = self.get_engine_buffers()
        self._refresh = buffers.refresh
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._track(local_shard(tensor), "weights")
            for state in iter_tensors([getattr(tensor, "quant_state", None)]):
                self._track(state, "weights")
        for category, tensor in buffers.tensors:
            self._track(tensor, category)
        for category, size in buffers.untracked_bytes:
            self._log(_TrackedStorage(size, category), 1)
        for parameter in (*self.model.parameters(), *buffers.gathered):
            if parameter.grad is not None:
                self._track(local_shard(parameter.grad), "gradients")
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._track_parameter_gradient))
        if buffers.inner_optimizer is not None:
            self._hooks.append(buffers.inner_optimizer.register_step_pre_hook(self._track_optimizer_gradients))
        if self.layers:
            self._hooks += self.layers.register_hooks()
            self._hooks.append(self.optimizer.register_step_pre_hook(partial(self._set_in_optimizer, True)))
            self._hooks.append(self.optimizer.register_step_post_hook(partial(self._set_in_optimizer, False)))
        self._track_optimizer_state()
        for parameter in buffers.gathered:
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
        if any(map(_is_wrapper, types)):  # it first dispatches to its inner tensors
            return NotImplemented
        self._operation = str(func)
        backward = torch._C._current_graph_task_id() != -1
        if backward and not torch.is_grad_enabled():  # an operation of the backward pass itself, not of a recomputation
            self._mark_activations()
        self._reclassify_inputs(func, args)
        result = func(*args, **(kwargs or {}))
        is_weight_copy = self._is_weight_copy(func, args)
        is_forward = self.get_step_part() == "forward" or (backward and torch.is_grad_enabled())
        results = tree_leaves(result)
        items = args[0] if args and isinstance(args[0], (list, tuple)) else None
        self._input_layer = None if items is not None else self._find_input_layer(args)
        for index, tensor in enumerate(results):
            if isinstance(tensor, torch.Tensor):
                if items is not None and len(items) == len(results):
                    self._input_layer = self._find_input_layer([items[index]])
                self._track_result(tensor, is_weight_copy=is_weight_copy, is_forward=is_forward)
        if items is not None:
            self._input_layer = None  # what is released from now on belongs to no single item
        return result

    def _find_input_layer(self, inputs: Sequence[Any]) -> int | None:
        """Return the tag of the first input that has one; None within layers, whose operations need no inputs' tags."""
        if not self.layers or self.layers.running is not None:
            return None
        return next((tag for tag in map(self._find_layer, inputs) if tag is not None), None)

    def _find_layer(self, tensor: object) -> int | None:
        """Return the tag of a tracked tensor, or of the first one in a list."""
        if isinstance(tensor, (list, tuple)):
            tensor = tensor[0] if tensor else None
        storage = _get_storage(tensor) if isinstance(tensor, torch.Tensor) else None
        tracked = self._live_storages.get(storage._cdata) if storage is not None else None
        return None if tracked is None else tracked.layer

    def _track_result(self, tensor: torch.Tensor, *, is_weight_copy: bool, is_forward: bool) -> None:
        storage = self._track(tensor, "weight_copies" if is_weight_copy else "temporaries")
        if storage is None:
            return
        if storage.category == "temporaries" and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
            storage.category = "logits"
        if is_forward and storage.category == "temporaries":
            self._forward_storages[id(storage)] = storage

    def _reclassify_inputs(self, func: Any, args: Any) -> None:
        """Reclassify inputs: an untracked parameter is a gathered weight, an input of a collective is a bucket."""
        if func.namespace == "c10d":
            for tensor in tree_leaves(args):
                if isinstance(tensor, torch.Tensor):
                    self._reassign(tensor, "buckets", {"temporaries", "gradients", "activations"})
            for category, tensor in self._refresh():
                self._reassign(tensor, category, {"temporaries", "gradients"})
        for tensor in args:
            if isinstance(tensor, nn.Parameter):
                self._reassign(tensor, "gathered_weights", {"temporaries", "buckets", "activations"})

    def _reassign(self, tensor: torch.Tensor, category: MemoryCategory, from_categories: set[MemoryCategory]) -> None:
        storage = _get_storage(tensor)
        tracked = self._live_storages.get(storage._cdata) if storage is not None else None
        if tracked is not None and tracked.category in from_categories:
            tracked.category = category

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
        for parameter, state in (*self.optimizer.state.items(), *((None, group) for group in groups)):
            self._input_layer = self.layers.find(parameter)
            for tensor in iter_tensors(state.values()):
                self._track(tensor, "optimizer_state")
        self._input_layer = None
        for tensor in self.list_method_tensors():
            self._track(tensor, "optimizer_state")

    def _track(self, tensor: torch.Tensor, category: MemoryCategory) -> _TrackedStorage | None:
        """Track the storage of ``tensor`` if it is new; a known one can become gradient or optimizer state."""
        storage = _get_storage(tensor)
        if storage is None or self._is_on_other_device(storage):
            return None
        key = storage._cdata
        tracked = self._live_storages.get(key)
        if tracked is None:
            tracked = self._live_storages[key] = _TrackedStorage(storage.nbytes(), category)
            self._log(tracked, 1, tensor)
            self._release_watches[key] = weakref.ref(storage, partial(self._on_release, key))
        elif category in {"gradients", "optimizer_state"}:
            tracked.category = category
        return tracked

    def _log(self, storage: _TrackedStorage, sign: int, tensor: torch.Tensor | None = None) -> None:
        part = self.get_step_part()
        layer = self.layers.running
        if layer is None and tensor is not None:
            layer = self.layers.find(tensor)
        if layer is None and part in {"optimizer", None} and (sign > 0 or self._is_in_optimizer):
            layer = self._input_layer
        if sign > 0:
            storage.layer = layer
        self._event_log.append(_LoggedEvent(storage, sign, self._operation, part, layer))

    def _set_in_optimizer(self, value: bool, *_: object) -> None:
        self._is_in_optimizer, self._input_layer = value, None

    def _build_tracked_resize(self) -> Callable[[torch.UntypedStorage, int], Any]:
        resize = torch.UntypedStorage.resize_

        def tracked_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._on_resize(storage)
            return result

        return tracked_resize

    def _on_resize(self, storage: torch.UntypedStorage) -> None:
        """Log a resized storage as a release and an allocation of the same category."""
        if self._is_on_other_device(storage):
            return
        key = storage._cdata
        before = self._live_storages.pop(key, None)
        if before is None:
            self._release_watches[key] = weakref.ref(storage, partial(self._on_release, key))
        else:
            self._forward_storages.pop(id(before), None)
            self._log(before, -1)
        after = self._live_storages[key] = _TrackedStorage(
            storage.nbytes(), before.category if before else "temporaries"
        )
        self._log(after, 1)

    def _on_release(self, key: int, _: object) -> None:
        storage = self._live_storages.pop(key)
        self._release_watches.pop(key, None)
        self._forward_storages.pop(id(storage), None)
        self._log(storage, -1)


def _is_wrapper(value: object) -> bool:
    """True for a tensor, or its class, whose own storage holds no memory: a DTensor, or torchao's quantized tensors."""
    return hasattr(value, "to_local") or hasattr(value, "__tensor_flatten__")


def _get_storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return the tensor's storage, None for a wrapper subclass without its own."""
    if _is_wrapper(tensor):
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
