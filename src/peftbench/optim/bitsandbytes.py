"""Optimizers of bitsandbytes, with states of 32 bits and of 8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftbench.optim.base import EMBEDDINGS_KEY, Beta, Optimizer, tensor_sizes

if TYPE_CHECKING:
    import torch

    from peftbench.optim.base import Parameters


_BLOCK_SIZE = 256
"""Values that share one scale in an 8-bit state."""
_MIN_8BIT_SIZE = 4096
"""Values from which bitsandbytes keeps a tensor's states in 8 bits."""
_QMAP_BYTES = 256 * 4
"""Of the table that translates 8 bits, of which an optimizer has one a state."""


class _BitsAndBytes(Optimizer):
    """bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861): states of 32 bits, or of 8 in blocks of 256 values."""

    num_states: ClassVar[int] = 2
    optim_bits: ClassVar[int] = 8
    library_class: ClassVar[str]
    """Name of the class."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the first and second moment."""
    embeddings_32bit: bool = True
    """Keep the states of embeddings in 32 bits, as the authors advise; false has 8 bits everywhere."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        import bitsandbytes

        apart = {id(parameter) for parameter in embeddings} if self.optim_bits == 8 and self.embeddings_32bit else set()
        trained = list(parameters)
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in apart]}]
        groups += [{"params": [p for p in trained if id(p) in apart], EMBEDDINGS_KEY: True}]
        kind = getattr(bitsandbytes.optim, self.library_class)
        made: torch.optim.Optimizer = kind(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            **self._extra_kwargs(),
        )
        return made

    def on_prepared(self, param_groups: Sequence[dict[str, Any]]) -> None:
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()  # type: ignore[attr-defined]
        manager.pid2config.clear()  # by address, and the process may have had another optimizer
        manager.index2config.clear()
        for group in param_groups:
            if group.get(EMBEDDINGS_KEY):
                manager.override_config(group["params"], "optim_bits", 32)

    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int:
        total, codes = 0, False
        for size, embedding in tensor_sizes(param_groups):
            if self.optim_bits == 32 or size < _MIN_8BIT_SIZE or embedding:
                total += self.num_states * 4 * size
            else:
                total += self.num_states * (size + 4 * math.ceil(size / _BLOCK_SIZE))
                codes = True
        return total + codes * self.num_states * _QMAP_BYTES

    def _extra_kwargs(self) -> dict[str, Any]:
        return {}


class _BitsAndBytesAdamW(_BitsAndBytes):
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    def _extra_kwargs(self) -> dict[str, Any]:
        return {"eps": self.eps}


_QUANTIZED_MOMENTS = "moments are kept in 8 bits, one scale for 256 values"


class AdamW8bit(_BitsAndBytesAdamW):
    """AdamW with moments in 8 bits."""

    approximation: ClassVar[str | None] = _QUANTIZED_MOMENTS
    library_class: ClassVar[str] = "AdamW8bit"

    kind: Literal["adamw8bit"] = "adamw8bit"
    """Which optimizer."""


class PagedAdamW8bit(_BitsAndBytesAdamW):
    """AdamW with moments in 8 bits, in memory that the driver moves to the CPU's when the GPU's is full."""

    approximation: ClassVar[str | None] = _QUANTIZED_MOMENTS
    library_class: ClassVar[str] = "PagedAdamW8bit"

    kind: Literal["paged_adamw8bit"] = "paged_adamw8bit"
    """Which optimizer."""


class AdamW32bit(_BitsAndBytesAdamW):
    """AdamW of bitsandbytes in 32 bits: what the 8-bit one is to be compared with."""

    optim_bits: ClassVar[int] = 32
    library_class: ClassVar[str] = "AdamW32bit"

    kind: Literal["adamw32bit"] = "adamw32bit"
    """Which optimizer."""


class Lion(_BitsAndBytes):
    """Lion (Chen et al. 2023, arXiv:2302.06675) in 32 bits: the sign of one moment. Wants a tenth of AdamW's rate."""

    num_states: ClassVar[int] = 1
    optim_bits: ClassVar[int] = 32
    library_class: ClassVar[str] = "Lion32bit"

    kind: Literal["lion"] = "lion"
    """Which optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decay within a step, and of the moment that is kept."""


class Lion8bit(Lion):
    """Lion with its moment in 8 bits."""

    approximation: ClassVar[str | None] = _QUANTIZED_MOMENTS
    optim_bits: ClassVar[int] = 8
    library_class: ClassVar[str] = "Lion8bit"

    kind: Literal["lion8bit"] = "lion8bit"  # type: ignore[assignment]
    """Which optimizer."""
