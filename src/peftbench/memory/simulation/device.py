"""Emulate another device on the meta device: its autocast casts and the kernels that torch selects there.

The meta device computes only shapes, so a model's step runs fast and needs no memory. But torch has no autocast for it
and decomposes attention and dropout generically. A ``TorchFunctionMode`` intercepts each call of a torch function
before that and dispatches it like the emulated device.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Self
from unittest.mock import patch

import numpy as np
import torch
from torch import _meta_registrations
from torch.nn import functional
from torch.optim import adam
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils

from peftbench.distributed.device_capability import DeviceCapability
from peftbench.memory.simulation.attention import attend_on_cpu, attend_on_cuda, run_cuda_dropout
from peftbench.memory.simulation.autocast_ops import FP32, FP32_SET_OPT_DTYPE, LOWER_PRECISION_FP, PROMOTE
from peftbench.memory.simulation.normalization import normalize_on_cpu
from peftbench.modeling import attention, cross_entropy
from peftbench.modeling.sdpa_kernels import KernelChoice, SdpaDevice
from peftbench.profiler.repetition import repeat_counts

DeviceType = Literal["cuda", "cpu"]
_FAKE_SCALARS = {"item": 1.0, "__float__": 1.0, "__int__": 1, "__bool__": True}
"""Values returned for reads of meta tensors where the value does not matter."""
_AUTOCAST = torch.autocast
_CUDNN_VERSION = 91501
"""cuDNN version assumed in plans: the first that torch prefers to flash attention. Both save equally many bytes."""


class DeviceEmulation(TorchFunctionMode):
    """Runs calls on meta tensors as ``device`` would; ``autocast_dtype`` None means no autocast."""

    def __init__(self, device: DeviceCapability, autocast_dtype: torch.dtype | None, *, has_padding: bool) -> None:
        super().__init__()
        self.device_type, self.autocast_dtype, self.has_padding = device.device_type, autocast_dtype, has_padding
        capability = device.compute_capability
        self.sdpa_device = None if capability is None else SdpaDevice(capability, _CUDNN_VERSION)
        """The facts that select an attention kernel; None on CPU."""
        self.allow_fake_scalars = False
        """True while reads of meta tensors return fake values: in the optimizer, where no size depends on them."""
        self.notes: dict[str, None] = {}
        """Notes for the plan on calls in simulated steps, in call order; a dict, to remove duplicates."""
        self._is_entered = False
        """True in simulated steps; False while the model is probed or its FLOPs are counted, without autocast."""
        self.kernel_choices: list[KernelChoice] = []
        """The attention kernel of each call on CUDA, in call order."""
        self._autocast_enabled = False
        self._autocast_depth = 0
        self._cached_casts: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._casts_of_freed_tensors: list[torch.Tensor] = []
        """torch also keeps the cast of a freed tensor until autocast ends."""

    def __enter__(self) -> Self:
        self._is_entered = True
        return super().__enter__()  # type: ignore[no-any-return,no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._is_entered = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def is_autocast_enabled(self) -> bool:
        """True inside an enabled autocast block."""
        return self._autocast_enabled

    @contextmanager
    def autocast(self, *, enabled: bool = True) -> Iterator[None]:
        """Emulate ``torch.autocast``: cast copies of weights are cached until the outermost block exits."""
        before, self._autocast_enabled = self._autocast_enabled, enabled and self.autocast_dtype is not None
        self._autocast_depth += 1
        try:
            yield
        finally:
            self._autocast_enabled = before
            self._autocast_depth -= 1
            if not self._autocast_depth:
                self._cached_casts.clear()
                self._casts_of_freed_tensors.clear()

    @contextmanager
    def recompute(self) -> Iterator[None]:
        """Enter this mode with autocast for recomputation in the backward pass, where torch disables modes."""
        with self, self.autocast():
            yield

    @contextmanager
    def patch_libraries(self) -> Iterator[None]:
        """Patch helpers of transformers that read tensor values, and of torch that check a tensor's device."""
        from transformers import masking_utils
        from transformers.integrations import moe
        from transformers.utils import generic

        def emulated_maybe_autocast(device_type: str, enabled: bool = True, **_: Any) -> Any:
            return self.autocast(enabled=enabled) if self._autocast_enabled or enabled else nullcontext()

        with ExitStack() as patches:

            def put(target: object, name: str, value: object) -> None:
                patches.enter_context(patch.object(target, name, value))

            original = generic.maybe_autocast
            for module in list(sys.modules.values()):
                if vars(module).get("maybe_autocast") is original:
                    put(module, "maybe_autocast", emulated_maybe_autocast)
            put(masking_utils, "fast_all", lambda _: not self.has_padding)
            put(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None)
            put(
                cross_entropy,
                "_compute_dtype",
                lambda hidden: self.autocast_dtype if self._autocast_enabled else hidden.dtype,
            )
            put(cross_entropy, "iterate_chunks", partial(_iterate_few_chunks, cross_entropy.iterate_chunks))
            put(
                attention,
                "_is_upcast_to_float32",
                lambda query: self.device_type == "cpu" and (self._autocast_enabled or _is_low_precision(query)),
            )
            put(attention, "_get_sdpa_device", lambda _: self.sdpa_device)
            put(attention, "_explain_kv_repetition", self._note_repetition(attention._explain_kv_repetition))
            put(
                attention,
                "_get_attention_dtype",
                lambda query: self.autocast_dtype if self._autocast_enabled else query.dtype,
            )
            put(_meta_registrations, "_meta_grouped_mm_common", self._allocate_grouped_mm_output)
            put(moe, "_can_use_grouped_mm", lambda *_: self._has_grouped_mm)
            if torch.autocast is _AUTOCAST:  # DeepSpeed's emulation replaces it, too
                put(torch, "autocast", self._replace_autocast)
            if self.device_type == "cuda":
                foreach_devices = _foreach_utils._get_foreach_kernels_supported_devices()
                put(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: [*foreach_devices, "meta"])
            put(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._autocast_enabled:
            args, kwargs = self._cast_arguments(name, args, kwargs)
        if self.allow_fake_scalars and name in _FAKE_SCALARS and args[0].is_meta:
            return _FAKE_SCALARS[name]
        if self.allow_fake_scalars and name == "tolist" and args[0].is_meta:
            return np.ones(tuple(args[0].shape), dtype=int).tolist()
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is functional.layer_norm and self.device_type == "cpu":
            return normalize_on_cpu(*args, **kwargs)
        if func is functional.dropout and self.device_type == "cuda":
            return run_cuda_dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _replace_autocast(self, device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
        if device_type != "meta":
            return _AUTOCAST(device_type, *args, **kwargs | {"enabled": enabled})
        return self.autocast(enabled=enabled)

    @property
    def _has_grouped_mm(self) -> bool:
        """True if transformers runs experts with ``torch.grouped_mm``: on CPU, and on Ampere or newer."""
        return self.sdpa_device is None or self.sdpa_device.compute_capability >= (8, 0)

    def _allocate_grouped_mm_output(
        self,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        *_: object,
        offs: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        **__: object,
    ) -> torch.Tensor:
        """Return an empty output of ``grouped_mm`` in any dtype; torch's meta function supports only bf16.

        Rows are padded to 16 bytes (``create_grouped_gemm_output_tensor`` in ATen/native/GroupedMMUtils.h).
        """
        groups = inputs.shape[:1] if offs is None else offs.shape
        is_batched = (inputs.dim() == 2) == (weights.dim() == 2)
        rows, columns = inputs.shape[-2], weights.shape[-1]
        dtype = out_dtype or inputs.dtype
        alignment = 16 // dtype.itemsize
        padded = -(-columns // alignment) * alignment
        if is_batched:
            return torch.empty_strided((*groups, rows, columns), (rows * padded, padded, 1), dtype=dtype, device="meta")
        return torch.empty_strided((rows, columns), (padded, 1), dtype=dtype, device="meta")

    def _attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.sdpa_device is None:
            return attend_on_cpu(*args, **kwargs)
        output, choice = attend_on_cuda(self.sdpa_device, *args, **kwargs)
        self.kernel_choices.append(choice)
        if self._is_entered and choice.kernel == "math" and output.requires_grad:
            note = "attention uses torch's math kernel, which stores the score matrix of every head"
            self.notes[f"{note}: {choice.describe_obstacles()}"] = None
        return output

    def _note_repetition(self, find_reason: Callable[..., str | None]) -> Callable[..., str | None]:
        def find_and_note(module: torch.nn.Module, query: torch.Tensor, *args: Any) -> str | None:
            reason = find_reason(module, query, *args)
            if self._is_entered and reason is not None and query.requires_grad:
                note = "keys and values are repeated for each query head, so that a fused kernel runs"
                self.notes[f"{note}: {reason}"] = None
            return reason

        return find_and_note

    def _cast_arguments(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.autocast_dtype is not None
        if name in LOWER_PRECISION_FP[self.device_type]:
            return _map_tensors(args, kwargs, self._to_lower_precision)
        if name in FP32[self.device_type]:
            return _map_tensors(args, kwargs, lambda t: t.float() if _is_low_precision(t) else t)
        if (
            name in FP32_SET_OPT_DTYPE[self.device_type]
            and args
            and _is_low_precision(args[0])
            and kwargs.get("dtype") is None
        ):
            return args, {**kwargs, "dtype": torch.float32}
        if name in PROMOTE[self.device_type]:
            tensors = [t for t in _iter_tensors(args) if t.is_floating_point()]
            if any(t.dtype == torch.float32 for t in tensors):
                return _map_tensors(args, kwargs, lambda t: t.float() if _is_low_precision(t) else t)
        return args, kwargs

    def _to_lower_precision(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.float32 and not (_is_low_precision(tensor) and tensor.dtype != self.autocast_dtype):
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32):
            return tensor.to(self.autocast_dtype)
        cached = self._cached_casts.get(id(tensor))  # autocast caches casts of trained leaves only
        if cached is not None and cached[0]() is not tensor:  # Python reuses the id of a freed tensor
            self._casts_of_freed_tensors.append(cached[1])
            cached = None
        if cached is None:
            cached = self._cached_casts[id(tensor)] = weakref.ref(tensor), tensor.to(self.autocast_dtype)
        return cached[1]


_SIMULATED_CHUNKS = 3


def _iterate_few_chunks(
    iterate_chunks: Callable[[int, int], Iterator[slice]], num_positions: int, vocabulary: int
) -> Iterator[slice]:
    """Yield the first three chunks of logits and the last one, if it is shorter.

    The third full chunk stands for all later ones: it allocates what the second one released, and so do they.
    """
    chunks = list(iterate_chunks(num_positions, vocabulary))
    num_full = sum(chunk.stop <= num_positions for chunk in chunks)
    if num_full <= _SIMULATED_CHUNKS:
        yield from chunks
        return
    yield from chunks[: _SIMULATED_CHUNKS - 1]
    with repeat_counts(num_full - _SIMULATED_CHUNKS + 1):
        yield chunks[_SIMULATED_CHUNKS - 1]
    yield from chunks[num_full:]


def _is_low_precision(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _iter_tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _iter_tensors(value)


def _map_tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def map_value(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return fn(value) if value.is_floating_point() else value
        if isinstance(value, (list, tuple)):
            return type(value)(map_value(item) for item in value)
        return value

    # Last argument first: torch's builds evaluate casts in that order, and the backward pass follows it.
    mapped = [map_value(value) for value in reversed(args)]
    return tuple(reversed(mapped)), {key: map_value(value) for key, value in kwargs.items()}
