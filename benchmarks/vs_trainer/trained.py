"""The measurements of an arm, and the model that every arm trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from spec import Job, method_settings

from peftbench.methods import AnyMethod
from peftbench.methods.base import Method
from peftbench.modeling.loading import LoadedModel, load_model
from peftbench.profiler.flops import FlopCost, UnsupportedFlopsError, count_flops
from peftbench.recipe.schema import Model
from peftbench.record import Memory

if TYPE_CHECKING:
    from torch import nn

COUNTED_STEP = 1
"""Step whose FLOPs are counted: the first, as in peftbench."""


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    seconds: float
    real_tokens: tuple[int, ...]
    """Per step, as this arm received them."""
    labeled_tokens: tuple[int, ...]
    memory: Memory
    model_flops: int | None
    hardware_flops: int | None
    trainable_parameters: int
    model_fingerprint: str
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Applied:
    """A base model adapted by peftbench's code, so that all arms train the same model."""

    method: Method
    base: LoadedModel
    model: nn.Module

    def cost(self) -> FlopCost | None:
        """Return its FLOP cost; None if unknown."""
        try:
            return count_flops(
                self.model,
                self.base.model,
                virtual_tokens=self.method.virtual_tokens,
                gradient_checkpointing=False,
                computes_all_logits=False,  # changes no model FLOPs; hardware FLOPs are counted
            )
        except UnsupportedFlopsError:
            return None

    @property
    def trainable_parameters(self) -> int:
        """Return the number of trainable scalars."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def method_of(job: Job) -> Method:
    """Return the case's method with the benchmark's settings."""
    method: Method = TypeAdapter(AnyMethod).validate_python(method_settings(job.case, job.spec))
    return method


def applied(job: Job, *, flattens: bool) -> Applied:
    """Return the peers' model: Hugging Face's modules, where peftbench uses its fused GELU (2.4e-7 off)."""
    from accelerate.utils import set_seed

    base = load_model(
        Model(
            path=job.base,
            dropout=job.spec.dropout,
            fused_gelu=False,
            attention="flash_attention_2" if flattens else "sdpa",
        )
    )
    set_seed(job.spec.seed)  # at the same point as peftbench: new weights depend on the seed only
    method = method_of(job)
    model = method.apply(base.model, base.tokenizer)
    method.set_training(model)
    return Applied(method, base, model)
