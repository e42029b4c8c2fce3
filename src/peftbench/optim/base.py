"""The base class of optimizers: their common options, and the facts by which engines and memory plans choose."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftbench.common.schema import ConfigSection
from peftbench.optim.roles import NO_ROLES, ParameterRoles

if TYPE_CHECKING:
    import torch
    from torch import nn

    Parameters = Iterable[nn.Parameter]

EMBEDDINGS_KEY = "embeddings"
"""Key that marks a parameter group of embeddings."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(ConfigSection):
    """An optimizer's options. Everything that other modules need to know about it is an attribute of its class."""

    library: ClassVar[str] = "torch"
    """Distribution that implements it, by its name on PyPI."""
    optim_bits: ClassVar[int] = 32
    """Bits of a value of its states."""
    is_paged: ClassVar[bool] = False
    """True if the GPU's driver may move its states to CPU memory."""
    is_cpu_only: ClassVar[bool] = False
    """True if it steps only states in CPU memory."""
    is_fused: ClassVar[bool] = False
    """True if one kernel steps all weights, on CPU and CUDA."""
    needs_matrices: ClassVar[bool] = False
    """True if it treats a matrix differently from the vector of its values."""
    dtensor_limitation: ClassVar[str | None] = None
    """Reason for which it cannot step DTensors (fsdp2's sharded tensors); None if it supports them."""
    deepspeed_limitation: ClassVar[str | None] = None
    """Reason for which it cannot step the flat vectors of ZeRO; None if it can, or if ``needs_matrices`` is set."""
    ddp_limitation: ClassVar[str | None] = None
    """Reason for which it cannot step the replicas of DDP; None if it supports them."""
    needs_lora: ClassVar[bool] = False
    """True if it steps LoRA's matrices A and B differently; the method must add them."""
    freezes_blocks: ClassVar[bool] = False
    """True if each step trains only some blocks; the method must then train all weights."""
    averages_weights: ClassVar[bool] = False
    """True if an average of the weights is evaluated; the average replaces a decay of the learning rate."""
    weight_dtype: ClassVar[Literal["fp32", "bf16"]] = "fp32"
    """Type of the weights that it steps."""
    approximation: ClassVar[str | None] = None
    """Difference of its steps from AdamW's, SGD's or Lion's; None if they are equal."""
    fallbacks: ClassVar[tuple[str, ...]] = ()
    """Kinds of the most similar optimizers, which a refusal suggests first."""
    is_common_fallback: ClassVar[bool] = False
    """True if a refusal of any optimizer suggests it, after that optimizer's own fallbacks."""
    low_memory_variants: ClassVar[tuple[str, ...]] = ()
    """Kinds of optimizers with the same options and smaller states, which a memory search may use instead."""
    state_classes: ClassVar[Mapping[str, str]] = {}
    """Name -> module of the classes of its states in addition to tensors and numbers."""

    kind: str
    """Kind of optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay on every trained tensor; decoupled, except SGD's."""

    @abstractmethod
    def build(self, parameters: Parameters, roles: ParameterRoles = NO_ROLES) -> torch.optim.Optimizer:
        """Build a torch optimizer over ``parameters``; ``roles`` groups them by their place in the model.

        Raises:
            OptimizerError: its library is not installed or does not work on this machine.
        """

    def prepare_model(self, model: nn.Module) -> None:
        """Freeze the parameters of ``model`` that it never trains, right after the method was applied.

        Raises:
            OptimizerError: it cannot train this model.
        """

    def on_prepared(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Adapt to the parameter groups of an engine, which may have replaced the parameters by tensors of its own."""

    def list_notes(self, _param_groups: Sequence[dict[str, Any]]) -> list[str]:
        """Return notes on the training for the record."""
        return []

    def list_plan_notes(self) -> list[str]:
        """Return notes on the memory plan of a training with this optimizer."""
        return []

    def start_step(self, optimizer: torch.optim.Optimizer, step: int, seed: int) -> None:
        """Choose the parameters that ``step`` (counted from 0) trains; only ``step`` and ``seed`` determine them."""

    def first_step(self, model: nn.Module, seed: int) -> AbstractContextManager[None]:
        """Return a context in which only the parameters of ``model`` that the first step trains require gradients."""
        return nullcontext()

    def set_evaluation(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the model's weights, after the last step, to those that are evaluated and saved."""

    def evaluation_weights(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Return a context in which the model has the evaluated weights; the trained weights are restored at exit."""
        return nullcontext()

    def meta_context(self, device_type: str) -> AbstractContextManager[object]:
        """Return a context for steps on the meta device, which patches library calls that need values.

        ``device_type`` is that of the simulated device: "cuda" or "cpu".
        """
        return nullcontext()

    def to_simulated(self) -> Optimizer:
        """Return an optimizer with states of the same size that a simulation can step: torch allocates them all."""
        return self

    @abstractmethod
    def state_bytes(self, param_groups: Sequence[dict[str, Any]]) -> int | None:
        """Compute the bytes of its states after a step over ``param_groups`` in closed form; None if none is known."""


class AdamLike(Optimizer):
    """Options of Adam and its variants."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


def tensor_sizes(param_groups: Sequence[dict[str, Any]]) -> list[tuple[int, bool]]:
    """Return the number of values of each tensor, and whether it is in a group of embeddings."""
    return [
        (parameter.numel(), bool(group.get(EMBEDDINGS_KEY))) for group in param_groups for parameter in group["params"]
    ]
