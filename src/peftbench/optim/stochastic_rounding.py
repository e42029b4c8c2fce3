"""AdamW over bf16 weights with stochastic rounding, from torchao.

An update of Adam is often smaller than half the distance between two bf16 numbers, so that rounding to nearest always
discards it. Stochastic rounding is unbiased: it keeps the update on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from unittest.mock import patch

from peftbench.errors import OptimizerError
from peftbench.optim.base import EMBEDDINGS_KEY, AdamLike, tensor_sizes
from peftbench.optim.roles import NO_ROLES, ParameterRoles

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


_BLOCK_SIZE = 256
"""Values that share one scale in an 8-bit state."""
_MIN_8BIT_SIZE = 4096
"""Number of values from which torchao quantizes a tensor's states to 8 bits, if the blocks divide it."""


class _StochasticRounding(AdamLike):
    library: ClassVar[str] = "torchao"
    weight_dtype: ClassVar[Literal["fp32", "bf16"]] = "bf16"
    dtensor_limitation: ClassVar[str | None] = "stochastic rounding of DTensors is untested"
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw8bit",)
    library_class: ClassVar[str]
    """Name of its class in torchao.optim."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        try:
            import torchao.optim
        except ImportError as error:
            raise OptimizerError(f"optimizer.kind={self.kind} needs torchao; install peftbench[optimizers]") from error
        trained = list(parameters)
        fp32_ids = {id(parameter) for parameter in roles.embeddings} if self._has_32bit_embeddings() else set()
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in fp32_ids]}]
        groups += [{"params": [p for p in trained if id(p) in fp32_ids], EMBEDDINGS_KEY: True}]
        library_class = _build_subclass(
            getattr(torchao.optim, self.library_class), fp32_ids, all(parameter.is_cuda for parameter in trained)
        )
        optimizer: torch.optim.Optimizer = library_class(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            bf16_stochastic_round=True,
        )
        return optimizer

    def meta_context(self, device_type: str) -> AbstractContextManager[object]:
        """Replace the step by the memory of its compiled kernel, on a GPU; on CPU it is not compiled."""
        if device_type != "cuda":
            return nullcontext()
        from torchao.optim import adam

        return patch.object(adam, "single_param_adam", allocate_compiled_step)

    def _has_32bit_embeddings(self) -> bool:
        return False


def allocate_compiled_step(
    parameter: torch.Tensor, gradient: torch.Tensor, _step: torch.Tensor, exp_avg: Any, exp_avg_sq: Any, *_: object
) -> None:
    """Allocate what torch's compiler allocates for a step of one parameter, and read and write what it does.

    One kernel does the step. It has no buffers, except for a state that is quantized: the scale of each block, and the
    values divided by it in float32, before they are rounded.
    """
    import torch

    buffers: list[torch.Tensor] = []
    for state in (exp_avg, exp_avg_sq):
        is_quantized = hasattr(state, "scale")
        tensors = [state.codes, state.scale] if is_quantized else [state]
        if is_quantized:
            buffers += [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
        for tensor in tensors:
            tensor.mul_(1)
    parameter.add_(gradient)


def _build_subclass(library_class: Any, fp32_parameter_ids: set[int], can_compile: bool) -> Any:
    """Return a subclass of torchao's class with 32-bit states for the parameters with these ids."""
    import torch

    class Adapted(library_class):  # type: ignore[misc]
        def _new_buffer(self, parameter: torch.Tensor, signed: bool) -> torch.Tensor:
            if id(parameter) in fp32_parameter_ids:
                return torch.zeros_like(parameter, dtype=torch.float32)
            buffer: torch.Tensor = super()._new_buffer(parameter, signed)
            return buffer

        def step(self, closure: Any = None) -> Any:
            # On CPU, compiling a step for every shape takes minutes.
            with nullcontext() if can_compile else torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    Adapted.__name__ = Adapted.__qualname__ = library_class.__name__
    return Adapted


class AdamWBf16(_StochasticRounding):
    """AdamW with bf16 weights and moments."""

    approximation: ClassVar[str | None] = "weights and moments are in bf16, rounded stochastically"
    optim_bits: ClassVar[int] = 16
    library_class: ClassVar[str] = "_AdamW"

    kind: Literal["adamw_bf16"] = "adamw_bf16"
    """Kind of optimizer."""

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        return sum(2 * 2 * size + 4 for size, _ in tensor_sizes(param_groups))


class AdamW8bitBf16(_StochasticRounding):
    """AdamW with bf16 weights and 8-bit moments."""

    optim_bits: ClassVar[int] = 8
    approximation: ClassVar[str | None] = (
        "weights are in bf16, rounded stochastically, and moments are quantized to 8 bits"
    )
    state_classes: ClassVar[Mapping[str, str]] = {"OptimState8bit": "torchao.optim.subclass_8bit"}
    library_class: ClassVar[str] = "AdamW8bit"

    kind: Literal["adamw8bit_bf16"] = "adamw8bit_bf16"
    """Kind of optimizer."""
    embeddings_32bit: bool = True
    """Keep the states of embeddings in 32 bits, as adamw8bit does; false quantizes them too."""

    def _has_32bit_embeddings(self) -> bool:
        return self.embeddings_32bit

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        total = 0
        for size, embedding in tensor_sizes(param_groups):
            if embedding:
                total += 4 + 2 * 4 * size
                continue
            is_quantized = size >= _MIN_8BIT_SIZE and size % _BLOCK_SIZE == 0
            # Each state has its own code table.
            total += 4 + 2 * (size + 4 * math.ceil(size / _BLOCK_SIZE) + 4 * 256 if is_quantized else 2 * size)
        return total
