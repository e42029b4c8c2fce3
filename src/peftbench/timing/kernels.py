"""The operations that calibration measures: one per class of operations, with inputs of a given size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peftbench.timing.kernel_classes import KernelClass

Arguments = tuple[Any, ...]
_WIDTH = 256
_VOCABULARY = 4096
_ADAMW_KEYS: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "eps": 1e-8,
    "amsgrad": False,
    "maximize": False,
}


@dataclass(frozen=True)
class TrafficKernel:
    """One operation that moves bytes."""

    kernel_class: KernelClass
    make_arguments: Callable[[int, torch.dtype, torch.device], Arguments]
    """Takes the number of values, their type and the device."""
    run: Callable[..., Any]
    is_in_steps_of_any_type: bool = True
    """False if a step runs it in fp32 only."""


def _rows(num_values: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return random values in rows of ``width``, at least one."""
    return torch.randn((max(1, num_values // width), width), device=device).to(dtype)


def _one(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    return (_rows(num_values, _WIDTH, dtype, device),)


def _two(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    return tuple(_rows(num_values, _WIDTH, dtype, device) for _ in range(2))


def _wide(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    return (_rows(num_values, _VOCABULARY, dtype, device),)


def _wide_with_gradient(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    values = _rows(num_values, _VOCABULARY, dtype, device)
    return values, torch.log_softmax(values, -1)


def _norm_inputs(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    weight = torch.ones(_WIDTH, device=device, dtype=dtype)
    return _rows(num_values, _WIDTH, dtype, device), weight, torch.zeros_like(weight)


def _norm_backward_inputs(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    values, weight, bias = _norm_inputs(num_values, dtype, device)
    _, mean, deviation = torch.native_layer_norm(values, (_WIDTH,), weight, bias, 1e-5)
    return torch.randn_like(values), values, mean, deviation, weight, bias


def _table(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    rows = max(1, num_values // _WIDTH)
    return torch.randn((_VOCABULARY, _WIDTH), device=device).to(dtype), torch.randint(
        _VOCABULARY, (rows,), device=device
    )


def _table_gradient(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    _, index = _table(num_values, dtype, device)
    return _rows(num_values, _WIDTH, dtype, device), index


def _adamw_state(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    lists = [[torch.rand(num_values, device=device).to(dtype)] for _ in range(4)]
    return (*lists, [torch.ones((), device=device)])


def _cast(values: torch.Tensor) -> torch.Tensor:
    """Copy to the other type of a step with 16 bits: 16 bits from fp32, else fp32."""
    return values.to(torch.float32) if values.dtype != torch.float32 else values.to(torch.bfloat16)


_ATEN = torch.ops.aten
TRAFFIC_KERNELS = (
    TrafficKernel("copy", _one, _cast),
    TrafficKernel("arithmetic", _two, torch.add),
    TrafficKernel("fill", _one, torch.zeros_like),
    TrafficKernel("activation", _one, lambda values: _ATEN.gelu(values, approximate="tanh")),
    TrafficKernel(
        "activation_backward", _two, lambda grad, values: _ATEN.gelu_backward(grad, values, approximate="tanh")
    ),
    TrafficKernel(
        "normalization",
        _norm_inputs,
        lambda values, weight, bias: torch.native_layer_norm(values, (_WIDTH,), weight, bias, 1e-5),
    ),
    TrafficKernel(
        "normalization_backward",
        _norm_backward_inputs,
        lambda grad, values, mean, deviation, weight, bias: _ATEN.native_layer_norm_backward(
            grad, values, (_WIDTH,), mean, deviation, weight, bias, [True, True, True]
        ),
    ),
    TrafficKernel("softmax", _wide, lambda values: _ATEN._log_softmax(values, -1, False)),
    TrafficKernel(
        "softmax_backward",
        _wide_with_gradient,
        lambda grad, output: _ATEN._log_softmax_backward_data(grad, output, -1, output.dtype),
    ),
    TrafficKernel("reduction", _one, lambda values: values.sum(0)),
    TrafficKernel("gather", _table, _ATEN.embedding),
    TrafficKernel(
        "scatter",
        _table_gradient,
        lambda grad, index: _ATEN.embedding_dense_backward(grad, index, _VOCABULARY, -1, False),
    ),
    TrafficKernel("random", _one, lambda values: torch.native_dropout(values, 0.1, True)),
    TrafficKernel(
        "adamw",
        _adamw_state,
        lambda weights, grads, means, squares, steps: torch._fused_adamw_(
            weights, grads, means, squares, [], steps, **_ADAMW_KEYS
        ),
        is_in_steps_of_any_type=False,
    ),
)


def make_adamw8bit() -> TrafficKernel | None:
    """Return the update of bitsandbytes' 8-bit AdamW, None if the library is not installed."""
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        return None

    def make(num_values: int, dtype: torch.dtype, device: torch.device) -> Arguments:
        weight = torch.nn.Parameter(torch.randn((max(16, num_values // _WIDTH), _WIDTH), device=device).to(dtype))
        weight.grad = torch.randn_like(weight)
        optimizer = AdamW8bit([weight], lr=1e-3)
        optimizer.step()  # creates the states
        return (optimizer,)

    return TrafficKernel("adamw8bit", make, lambda optimizer: optimizer.step(), is_in_steps_of_any_type=False)
