"""The kernel that torch's ``scaled_dot_product_attention`` (SDPA) selects on a CUDA device, and why.

The conditions are those of torch 2.13, which evaluates them in C++ and only on a GPU:

- ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``: ``can_use_cudnn_attention``, ``can_use_flash_attention``,
  ``can_use_mem_efficient_attention``, ``select_sdp_backend``;
- ``aten/src/ATen/native/transformers/sdp_utils_cpp.h``: conditions that several kernels share. torch's wheel contains
  this header; line numbers below refer to it.

Left out are nested tensors, settings that peftbench does not change (deterministic algorithms, disabled kernels,
``TORCH_CUDNN_SDPA_DEPRIORITIZED``) and cuDNN's limit of 65,535 rows or heads.

Each condition here names the function that it mirrors. ``tests/gpu/test_sdpa_kernels.py`` compares them with torch's
``torch.backends.cuda.can_use_*_attention`` on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

SdpaKernel = Literal["cudnn", "flash", "efficient", "math"]
Shape = tuple[int, int, int, int]
"""(batch, heads, length, width)."""
_NAMES: dict[SdpaKernel, str] = {
    "cudnn": "cuDNN attention",
    "flash": "flash attention",
    "efficient": "memory-efficient attention",
}
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_MAX_FLASH_WIDTH = 256
_AMPERE = (8, 0)
_MIN_CAPABILITY, _MAX_CAPABILITY = (5, 0), (12, 1)
"""The range of compute capabilities that torch 2.13 compiles fused kernels for."""
_MIN_PREFERRED_CUDNN = 91501
"""cuDNN 9.15.1, the first version that torch prefers to its own kernels (``check_prefer_cudnn_attention``)."""


@dataclass(frozen=True)
class SdpaDevice:
    """The facts of a CUDA device and its libraries on which the choice depends."""

    compute_capability: tuple[int, int]
    cudnn_version: int
    """The result of ``torch.backends.cudnn.version()``, e.g. 91900; 0 without cuDNN."""


@dataclass(frozen=True)
class SdpaCall:
    """The arguments of one call on which the choice depends."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    """The types of query, key and value."""
    query: Shape
    key: Shape
    value: Shape
    mask: tuple[int, ...] | None = None
    """Shape of the attention mask; None without a mask."""
    dropout: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False
    requires_grad: bool = False
    mask_requires_grad: bool = False
    """True if the mask is computed from trained weights."""
    has_unit_stride: bool = True
    """True if the last dimension of query, key, value and mask has stride 1."""

    @classmethod
    def from_tensors(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        dropout: float = 0.0,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> SdpaCall:
        """Return the facts of a call with these arguments; query, key and value have four dimensions."""
        inputs = (query, key, value)
        return cls(
            dtypes=(query.dtype, key.dtype, value.dtype),
            query=_to_shape(query),
            key=_to_shape(key),
            value=_to_shape(value),
            mask=None if mask is None else tuple(mask.shape),
            dropout=dropout,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            requires_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs),
            mask_requires_grad=mask is not None and mask.requires_grad,
            has_unit_stride=all(tensor.stride(-1) == 1 for tensor in (*inputs, *([] if mask is None else [mask]))),
        )


def _to_shape(tensor: torch.Tensor) -> Shape:
    batch, heads, length, width = tensor.shape
    return batch, heads, length, width


@dataclass(frozen=True)
class KernelChoice:
    """The selected kernel, and for each kernel that comes before it the reason why it was not selected."""

    kernel: SdpaKernel
    obstacles: dict[SdpaKernel, str]

    def describe_obstacles(self) -> str:
        """Return the obstacles as clauses, e.g. "flash attention does not support a mask"."""
        return "; ".join(f"{_NAMES[kernel]} {reason}" for kernel, reason in self.obstacles.items())


def select_kernel(call: SdpaCall, device: SdpaDevice) -> KernelChoice:
    """Return the first kernel in torch's order that supports the call (``priority_order``, ``select_sdp_backend``)."""
    order: list[SdpaKernel] = ["flash", "efficient"]
    if _prefers_cudnn(device):
        order.insert(0, "cudnn")
    obstacles: dict[SdpaKernel, str] = {}
    for kernel in order:
        obstacle = find_obstacle(kernel, call, device)
        if obstacle is None:
            return KernelChoice(kernel, obstacles)
        obstacles[kernel] = obstacle
    return KernelChoice("math", obstacles)


def find_obstacle(kernel: SdpaKernel, call: SdpaCall, device: SdpaDevice) -> str | None:
    """Return why ``kernel`` does not support the call on the device, as a predicate; None if it does."""
    return next((reason for condition in _CONDITIONS[kernel] if (reason := condition(call, device))), None)


def _prefers_cudnn(device: SdpaDevice) -> bool:
    """Mirror ``check_prefer_cudnn_attention``: Hopper and the data center cards of Blackwell."""
    major, minor = device.compute_capability
    return device.cudnn_version >= _MIN_PREFERRED_CUDNN and major in {9, 10} and minor in {0, 3}


Condition = Callable[[SdpaCall, SdpaDevice], str | None]


def _check_width_flash(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_head_dim_size_flash``."""
    widths = (call.query[3], call.key[3], call.value[3])
    if len(set(widths)) > 1:
        return f"needs equal head dimensions for keys and values, not {widths[1]} and {widths[2]}"
    if widths[0] > _MAX_FLASH_WIDTH:
        return f"supports head dimensions up to {_MAX_FLASH_WIDTH}, not {widths[0]}"
    return None


def _check_mask_absent(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_for_attn_mask`` (line 260)."""
    return "does not support a mask" if call.mask is not None else None


def _check_ampere(_call: SdpaCall, device: SdpaDevice) -> str | None:
    """Mirror ``check_flash_attention_hardware_support`` and ``check_cudnn_hardware_support``."""
    return _check_range(device, _AMPERE)


def _check_hardware_efficient(_call: SdpaCall, device: SdpaDevice) -> str | None:
    """Mirror ``check_mem_efficient_hardware_support``."""
    return _check_range(device, _MIN_CAPABILITY)


def _check_range(device: SdpaDevice, oldest: tuple[int, int]) -> str | None:
    if oldest <= device.compute_capability <= _MAX_CAPABILITY:
        return None
    texts = [f"{major}.{minor}" for major, minor in (oldest, _MAX_CAPABILITY, device.compute_capability)]
    return f"needs compute capability {texts[0]} to {texts[1]}, not {texts[2]}"


def _check_wide_backward(call: SdpaCall, device: SdpaDevice) -> str | None:
    """Mirror ``check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120``."""
    capability, width = device.compute_capability, call.query[3]
    has_less_shared_memory = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= _MAX_CAPABILITY
    is_unsupported = 192 < width <= 224 or (width > 224 and call.dropout > 0)
    if call.requires_grad and has_less_shared_memory and is_unsupported:
        return f"has no backward pass for a head dimension of {width} on this GPU"
    return None


def _check_square(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_flash_causal_non_square_seqlens``."""
    if call.is_causal and call.query[2] != call.key[2]:
        return f"needs as many queries as keys for is_causal, not {call.query[2]} and {call.key[2]}"
    return None


def _check_dtype_16_bits(call: SdpaCall, device: SdpaDevice) -> str | None:
    """Mirror ``check_dtypes_low_precision``."""
    return _check_dtypes(call, _SIXTEEN_BITS if device.compute_capability >= _AMPERE else (torch.float16,))


def _check_dtype_efficient(call: SdpaCall, device: SdpaDevice) -> str | None:
    """Mirror the last lines of ``can_use_mem_efficient_attention``."""
    has_bf16 = device.compute_capability >= _AMPERE
    return _check_dtypes(call, (torch.float16, torch.float32, *((torch.bfloat16,) if has_bf16 else ())))


def _check_dtypes(call: SdpaCall, allowed: tuple[torch.dtype, ...]) -> str | None:
    """Mirror ``check_tensor_dtype`` (line 82)."""
    if len(set(call.dtypes)) == 1 and call.dtypes[0] in allowed:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in allowed]
    given = sorted({str(dtype).removeprefix("torch.") for dtype in call.dtypes})
    return f"needs {' or '.join(names)}, not {' and '.join(given)}"


def _check_nonempty(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_nonzero_sequence_lengths_dense`` (line 496)."""
    return None if call.query[2] and call.key[2] else "needs at least one query and one key"


def _check_stride(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_last_dim_stride_equals_1_dense`` (line 512)."""
    return None if call.has_unit_stride else "needs stride 1 in the last dimension"


def _check_heads_grouped(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_batch_size_and_num_heads_dense`` for kernels that take grouped queries (line 398)."""
    if not call.enable_gqa:
        return _check_heads_equal(call, _device)
    same_batch = call.query[0] == call.key[0] == call.value[0]
    divides = call.query[1] % call.key[1] == 0 and call.query[1] % call.value[1] == 0
    return None if same_batch and divides else _describe_heads(call)


def _check_heads_grouped_flash(call: SdpaCall, device: SdpaDevice) -> str | None:
    """Mirror ``check_grouped_query_attention``, which for flash also needs as many keys as values (line 358)."""
    obstacle = _check_heads_grouped(call, device)
    return obstacle or (_describe_heads(call) if call.key[1] != call.value[1] else None)


def _check_heads_equal(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_batch_size_and_num_heads_dense`` for a kernel that does not take grouped queries (line 398)."""
    return None if call.query[:2] == call.key[:2] == call.value[:2] else _describe_heads(call)


def _describe_heads(call: SdpaCall) -> str:
    return f"does not support {call.query[1]} query heads with {call.key[1]} key and {call.value[1]} value heads"


def _check_width_efficient(call: SdpaCall, device: SdpaDevice) -> str | None:
    """Mirror ``check_head_dim_size_mem_efficient`` and ``minimum_gemm_alignment``."""
    is_16_bits = call.dtypes[0] in _SIXTEEN_BITS
    major = device.compute_capability[0]
    alignment = 4 if major >= _AMPERE[0] else 1
    if major >= _AMPERE[0] or (major >= 7 and is_16_bits):
        alignment = max(alignment, 8 if is_16_bits else 4)
    query, key, value = call.query[3], call.key[3], call.value[3]
    if query == key and query and value and query % alignment == value % alignment == 0:
        return None
    return f"needs head dimensions that are multiples of {alignment}, not {query} for keys and {value} for values"


def _check_mask_shape(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_attn_mask_shape`` (line 270)."""
    if call.mask is None:
        return None
    if call.mask_requires_grad:
        return "cannot compute a gradient for the mask"
    full = (call.query[0], call.query[1], call.query[2], call.key[2])
    fits = all(given in {1, needed} for given, needed in zip(call.mask, full[4 - len(call.mask) :], strict=True))
    return None if len(call.mask) in {2, 4} and fits else f"does not support a mask of shape {call.mask}"


def _check_dropout_cudnn(call: SdpaCall, _device: SdpaDevice) -> str | None:
    """Mirror ``check_cudnn_dropout``."""
    if math.floor(call.dropout * 16) == call.dropout * 16:
        return None
    return f"needs a dropout that is a multiple of 1/16, not {call.dropout:g}"


def _check_shapes_cudnn(call: SdpaCall, device: SdpaDevice) -> str | None:
    """Mirror ``check_cudnn_tensor_shapes`` for cuDNN 9.15.1 and newer; older versions are not preferred."""
    width, value_width = call.query[3], call.value[3]
    major, minor = device.compute_capability
    limit = 256 if (major, minor) == (9, 0) else 192 if major == 10 and (width, value_width) == (192, 128) else 128
    if max(width, value_width) > limit or width % 8 or value_width % 8:
        given = f"{width} for keys and {value_width} for values"
        return f"needs head dimensions that are multiples of 8 up to {limit}, not {given}"
    if call.key[2] == 1 or (call.query[2] == 1 and call.dropout):
        return f"does not support {call.query[2]} queries with {call.key[2]} keys"
    return None


_CONDITIONS: dict[SdpaKernel, tuple[Condition, ...]] = {
    "cudnn": (
        _check_dtype_16_bits,
        _check_mask_shape,
        _check_ampere,
        _check_dropout_cudnn,
        _check_nonempty,
        _check_stride,
        _check_heads_grouped,
        _check_shapes_cudnn,
    ),
    "flash": (
        _check_mask_absent,
        _check_width_flash,
        _check_ampere,
        _check_wide_backward,
        _check_square,
        _check_dtype_16_bits,
        _check_heads_grouped_flash,
        _check_nonempty,
        _check_stride,
    ),
    "efficient": (
        _check_hardware_efficient,
        _check_width_efficient,
        _check_nonempty,
        _check_stride,
        _check_heads_equal,
        _check_dtype_efficient,
    ),
    "math": (),
}
