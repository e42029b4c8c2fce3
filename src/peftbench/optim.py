"""OPTIMIZERS: what turns gradients into steps. An optimizer sees only the parameters that require a gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag

from peftbench.errors import OptimizerError
from peftbench.part import Part

if TYPE_CHECKING:
    import torch
    from torch import nn

    Parameters = Iterable[nn.Parameter]

EMBEDDINGS = "embeddings"
"""Key of a parameter group that holds embeddings alone."""
_BLOCK = 256
"""Values that share one scale in an 8-bit state."""
_SMALLEST_8BIT = 4096
"""Values from which bitsandbytes keeps a tensor's states in 8 bits."""
_CODE_BYTES = 256 * 4
"""Of the table that translates 8 bits, of which an optimizer has one a state."""

Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Part):
    """What all optimizers have in common."""

    needs_matrices: ClassVar[bool] = False
    """Whether it does something else to a matrix than to the vector of its values."""
    changes_trajectory: ClassVar[str | None] = None
    """Why its steps are no AdamW's, SGD's or Lion's but an approximation, None where they are."""

    kind: str
    """Which optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on every trained tensor."""

    @abstractmethod
    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        """A torch optimizer over ``parameters``, of which ``embeddings`` are embeddings' matrices.

        Raises:
            OptimizerError: the library it comes from is not installed, or cannot be used here.
        """

    def started(self, groups: Sequence[dict[str, Any]]) -> None:
        """Called once an engine has put its own tensors in place of the parameters, with the groups of them."""

    @abstractmethod
    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int | None:
        """Bytes of its states after a step over the tensors of ``groups``, in closed form; None where there is none."""


class _Betas(Optimizer):
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


class AdamW(_Betas):
    """AdamW (Loshchilov and Hutter 2019), torch's own, fused on CUDA."""

    kind: Literal["adamw"] = "adamw"
    """Which optimizer."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        import torch

        trained = list(parameters)
        return torch.optim.AdamW(
            trained,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=all(parameter.is_cuda for parameter in trained) or None,
        )

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        return sum(8 * size + 4 for size, _ in _sizes(groups))  # two moments, and a count of steps


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, torch's own. Its weight decay is not decoupled."""

    kind: Literal["sgd"] = "sgd"
    """Which optimizer."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum; 0 keeps no state."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        return sum(4 * size for size, _ in _sizes(groups)) if self.momentum else 0


class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), torch's own: rows and columns of a matrix's moment."""

    needs_matrices: ClassVar[bool] = True

    kind: Literal["adafactor"] = "adafactor"
    """Which optimizer."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """Exponent by which the second moment's decay approaches 1."""
    clip: float = Field(default=1.0, gt=0)
    """Most root mean square of an update."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        import torch

        return torch.optim.Adafactor(
            parameters, lr=self.learning_rate, beta2_decay=self.beta2_decay, d=self.clip, weight_decay=self.weight_decay
        )

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        shapes = (tuple(p.shape) for group in groups for p in group["params"])
        kept = (math.prod(s) if len(s) < 2 else math.prod(s[:-1]) + math.prod((*s[:-2], s[-1])) for s in shapes)
        return sum(4 * values + 4 for values in kept)


class _BitsAndBytes(Optimizer):
    """bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861): states of 32 bits, or of 8 in blocks of 256 values."""

    states: ClassVar[int] = 2
    bits: ClassVar[int] = 8
    of_library: ClassVar[str]
    """Name of the class."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    embeddings_32bit: bool = True
    """Keep the states of embeddings in 32 bits, as the authors advise; false has 8 bits everywhere."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        import bitsandbytes

        apart = {id(parameter) for parameter in embeddings} if self.bits == 8 and self.embeddings_32bit else set()
        trained = list(parameters)
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in apart]}]
        groups += [{"params": [p for p in trained if id(p) in apart], EMBEDDINGS: True}]
        kind = getattr(bitsandbytes.optim, self.of_library)
        made: torch.optim.Optimizer = kind(
            [group for group in groups if group["params"]], lr=self.learning_rate, betas=self.betas,
            weight_decay=self.weight_decay, **self._more(),
        )  # fmt: skip
        return made

    def started(self, groups: Sequence[dict[str, Any]]) -> None:
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()  # type: ignore[attr-defined]
        manager.pid2config.clear()  # by address, and the process may have had another optimizer
        manager.index2config.clear()
        for group in groups:
            if group.get(EMBEDDINGS):
                manager.override_config(group["params"], "optim_bits", 32)

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        total, codes = 0, False
        for size, embedding in _sizes(groups):
            if self.bits == 32 or size < _SMALLEST_8BIT or embedding:
                total += self.states * 4 * size
            else:
                total += self.states * (size + 4 * math.ceil(size / _BLOCK))
                codes = True
        return total + codes * self.states * _CODE_BYTES

    def _more(self) -> dict[str, Any]:
        return {}


class _BitsAndBytesAdamW(_BitsAndBytes):
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    def _more(self) -> dict[str, Any]:
        return {"eps": self.eps}


_QUANTISED = "moments are kept in 8 bits, one scale for 256 values"


class AdamW8bit(_BitsAndBytesAdamW):
    """AdamW with moments in 8 bits."""

    changes_trajectory: ClassVar[str | None] = _QUANTISED
    of_library: ClassVar[str] = "AdamW8bit"

    kind: Literal["adamw8bit"] = "adamw8bit"
    """Which optimizer."""


class PagedAdamW8bit(_BitsAndBytesAdamW):
    """AdamW with moments in 8 bits, in memory that the driver moves to the CPU's when the GPU's is full."""

    changes_trajectory: ClassVar[str | None] = _QUANTISED
    of_library: ClassVar[str] = "PagedAdamW8bit"

    kind: Literal["paged_adamw8bit"] = "paged_adamw8bit"
    """Which optimizer."""


class AdamW32bit(_BitsAndBytesAdamW):
    """AdamW of bitsandbytes in 32 bits: what the 8-bit one is to be compared with."""

    bits: ClassVar[int] = 32
    of_library: ClassVar[str] = "AdamW32bit"

    kind: Literal["adamw32bit"] = "adamw32bit"
    """Which optimizer."""


class Lion(_BitsAndBytes):
    """Lion (Chen et al. 2023, arXiv:2302.06675) in 32 bits: the sign of one moment. Wants a tenth of AdamW's rate."""

    states: ClassVar[int] = 1
    bits: ClassVar[int] = 32
    of_library: ClassVar[str] = "Lion32bit"

    kind: Literal["lion"] = "lion"
    """Which optimizer."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay within a step, and of the moment that is kept."""


class Lion8bit(Lion):
    """Lion with its moment in 8 bits."""

    changes_trajectory: ClassVar[str | None] = _QUANTISED
    bits: ClassVar[int] = 8
    of_library: ClassVar[str] = "Lion8bit"

    kind: Literal["lion8bit"] = "lion8bit"  # type: ignore[assignment]
    """Which optimizer."""


class DeepSpeedCPUAdam(_Betas):
    """AdamW by DeepSpeed, vectorised for states that lie in the CPU's memory; compiled on first use."""

    kind: Literal["deepspeed_cpu_adam"] = "deepspeed_cpu_adam"
    """Which optimizer."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam as Adam

        try:
            made: torch.optim.Optimizer = Adam(
                list(parameters), lr=self.learning_rate, betas=self.betas, eps=self.eps,
                weight_decay=self.weight_decay, adamw_mode=True,
            )  # fmt: skip
        except RuntimeError as error:
            raise OptimizerError(
                f"deepspeed_cpu_adam could not be compiled ({str(error).splitlines()[0]}); install g++ and ninja, or "
                "use optimizer.kind=adamw"
            ) from error
        return made

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        return sum(8 * size for size, _ in _sizes(groups))


class _LowRank(_Betas):
    needs_matrices: ClassVar[bool] = True
    of_library: ClassVar[str]

    rank: int = Field(default=128, gt=0)
    """Rank that a matrix's gradient is projected to."""
    update_gap: int = Field(default=200, gt=0)
    """Steps after which the projection is made anew."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on a projected step."""

    def build(self, parameters: Parameters, embeddings: Parameters = ()) -> torch.optim.Optimizer:
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise OptimizerError(
                f"optimizer.kind={self.kind} needs pytorch-optimizer; install peftbench[optimizers]"
            ) from error
        trained = list(parameters)
        apart = {id(parameter) for parameter in embeddings}
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in apart and min(p.shape) > self.rank]
        chosen = {id(parameter) for parameter in matrices}
        projected = {
            "params": matrices, "rank": self.rank, "update_proj_gap": self.update_gap, "scale": self.scale,
            "projection_type": "std",
        }  # fmt: skip
        rest = {"params": [parameter for parameter in trained if id(parameter) not in chosen]}
        made: torch.optim.Optimizer = getattr(pytorch_optimizer, self.of_library)(
            [group for group in (projected, rest) if group["params"]], lr=self.learning_rate, betas=self.betas,
            eps=self.eps, weight_decay=self.weight_decay,
        )  # fmt: skip
        return made

    def state_bytes(self, groups: Sequence[dict[str, Any]]) -> int:
        total = 0
        for group in groups:
            for shape in (tuple(parameter.shape) for parameter in group["params"]):
                if "rank" in group:  # two moments of the projected gradient, and the projection
                    total += 4 * group["rank"] * (2 * max(shape) + min(shape))
                else:
                    total += 8 * math.prod(shape)
        return total


class GaLore(_LowRank):
    """AdamW over gradients projected to a low rank (Zhao et al. 2024, arXiv:2403.03507); small matrices whole."""

    changes_trajectory: ClassVar[str | None] = "steps of matrices are of low rank"
    of_library: ClassVar[str] = "GaLore"

    kind: Literal["galore"] = "galore"
    """Which optimizer."""


class Apollo(_LowRank):
    """Gradients scaled as AdamW would in a random low-rank space (Zhu et al. 2024, arXiv:2412.05270)."""

    changes_trajectory: ClassVar[str | None] = "steps of matrices have the gradient's direction, and scales of low rank"
    of_library: ClassVar[str] = "APOLLO"

    kind: Literal["apollo"] = "apollo"
    """Which optimizer."""


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "adafactor": Adafactor,
    "lion": Lion,
    "adamw8bit": AdamW8bit,
    "paged_adamw8bit": PagedAdamW8bit,
    "lion8bit": Lion8bit,
    "adamw32bit": AdamW32bit,
    "deepspeed_cpu_adam": DeepSpeedCPUAdam,
    "galore": GaLore,
    "apollo": Apollo,
}

if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    # Knobs given without a kind are those of the default optimizer.
    AnyOptimizer = Annotated[
        Union[tuple(Annotated[optimizer, Tag(kind)] for kind, optimizer in OPTIMIZERS.items())],
        Discriminator(
            lambda knobs: knobs.get("kind", "adamw") if isinstance(knobs, dict) else getattr(knobs, "kind", None)
        ),
    ]


def _sizes(groups: Sequence[dict[str, Any]]) -> list[tuple[int, bool]]:
    """Values of each tensor, and whether it is an embedding's that is kept apart."""
    return [(parameter.numel(), bool(group.get(EMBEDDINGS))) for group in groups for parameter in group["params"]]
