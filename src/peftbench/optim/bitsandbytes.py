"""Optimizers of bitsandbytes, with 32-bit and 8-bit states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.optim.base import EMBEDDINGS_KEY, Beta, Optimizer, tensor_sizes
from peftbench.optim.roles import NO_ROLES, ParameterRoles

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


_BLOCK_SIZE = 256
"""Values that share one scale in an 8-bit state."""
_MIN_8BIT_SIZE = 4096
"""Number of values from which bitsandbytes quantizes a tensor's states to 8 bits."""
_QMAP_BYTES = 256 * 4
"""Bytes of the table that maps 8-bit codes to values; an optimizer has one for each kind of state."""


class _BitsAndBytes(Optimizer):
    """bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861): 32-bit states, or 8-bit states in blocks of 256 values."""

    library: ClassVar[str] = "bitsandbytes"
    optim_bits: ClassVar[int] = 8
    dtensor_limitation: ClassVar[str | None] = "bitsandbytes' kernels do not support DTensors"
    num_states: ClassVar[int] = 2
    """Number of state tensors for each parameter."""
    library_class: ClassVar[str]
    """Name of its class in bitsandbytes.optim."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    embeddings_32bit: bool = True
    """Keep the states of embeddings in 32 bits, as the authors advise; false quantizes them too."""

    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        import bitsandbytes

        embedding_ids = (
            {id(parameter) for parameter in roles.embeddings}
            if self.optim_bits == 8 and self.embeddings_32bit
            else set()
        )
        trained = list(parameters)
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in embedding_ids]}]
        groups += [{"params": [p for p in trained if id(p) in embedding_ids], EMBEDDINGS_KEY: True}]
        library_class = getattr(bitsandbytes.optim, self.library_class)
        optimizer: torch.optim.Optimizer = library_class(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            **self._extra_kwargs(),
        )
        return optimizer

    def on_prepared(self, param_groups: Sequence[dict[str, Any]]) -> None:
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()  # type: ignore[attr-defined]
        manager.pid2config.clear()  # keyed by address; an earlier optimizer of the process may have left entries
        manager.index2config.clear()
        for group in param_groups:
            if group.get(EMBEDDINGS_KEY):
                manager.override_config(group["params"], "optim_bits", 32)

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        total, has_8bit_states = 0, False
        for size, embedding in tensor_sizes(param_groups):
            if self.optim_bits == 32 or size < _MIN_8BIT_SIZE or embedding:
                total += self.num_states * 4 * size
            else:
                total += self.num_states * (size + 4 * math.ceil(size / _BLOCK_SIZE))
                has_8bit_states = True
        return total + has_8bit_states * self.num_states * _QMAP_BYTES

    def _extra_kwargs(self) -> dict[str, Any]:
        return {}


class _BitsAndBytesAdamW(_BitsAndBytes):
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    def _extra_kwargs(self) -> dict[str, Any]:
        return {"eps": self.eps}


_QUANTIZED_MOMENTS = "moments are quantized to 8 bits, with one scale for each 256 values"


class AdamW8bit(_BitsAndBytesAdamW):
    """AdamW with 8-bit moments."""

    is_common_fallback: ClassVar[bool] = True
    approximation: ClassVar[str | None] = _QUANTIZED_MOMENTS
    library_class: ClassVar[str] = "AdamW8bit"

    kind: Literal["adamw8bit"] = "adamw8bit"
    """Kind of optimizer."""


class PagedAdamW8bit(_BitsAndBytesAdamW):
    """AdamW with 8-bit moments in memory that the driver moves to the CPU when the GPU's is full."""

    is_paged: ClassVar[bool] = True
    fallbacks: ClassVar[tuple[str, ...]] = ("adamw8bit",)
    approximation: ClassVar[str | None] = _QUANTIZED_MOMENTS
    library_class: ClassVar[str] = "PagedAdamW8bit"

    kind: Literal["paged_adamw8bit"] = "paged_adamw8bit"
    """Kind of optimizer."""

    def to_simulated(self) -> AdamW8bit:
        return AdamW8bit(**self.model_dump(exclude={"kind"}))


class AdamW32bit(_BitsAndBytesAdamW):
    """AdamW of bitsandbytes with 32-bit moments: the reference for adamw8bit."""

    optim_bits: ClassVar[int] = 32
    library_class: ClassVar[str] = "AdamW32bit"

    kind: Literal["adamw32bit"] = "adamw32bit"
    """Kind of optimizer."""


class Lion(_BitsAndBytes):
    """Lion (Chen et al. 2023, arXiv:2302.06675) with a 32-bit moment. Needs about a tenth of AdamW's learning rate."""

    num_states: ClassVar[int] = 1
    optim_bits: ClassVar[int] = 32
    library_class: ClassVar[str] = "Lion32bit"

    kind: Literal["lion"] = "lion"
    """Kind of optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decay rates within a step, and of the stored moment."""


class Lion8bit(Lion):
    """Lion with an 8-bit moment."""

    approximation: ClassVar[str | None] = _QUANTIZED_MOMENTS
    fallbacks: ClassVar[tuple[str, ...]] = ("lion",)
    optim_bits: ClassVar[int] = 8
    library_class: ClassVar[str] = "Lion8bit"

    kind: Literal["lion8bit"] = "lion8bit"  # type: ignore[assignment]
    """Kind of optimizer."""
