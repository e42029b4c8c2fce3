"""What an arm gives back, and the model that every arm trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from spec import Job, method_knobs

from peftbench.methods import AnyMethod
from peftbench.methods.base import Method
from peftbench.modeling.loading import LoadedModel, load_model
from peftbench.profiler.flops import FlopCost, UnsupportedFlopsError, count_flops
from peftbench.recipe.schema import Model
from peftbench.record import Memory

if TYPE_CHECKING:
    from torch import nn

COUNTED_STEP = 1
"""Whose FLOPs are counted, as peftbench counts those of its first."""


@dataclass(frozen=True)
class Trained:
    """A training that has ended."""

    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    seconds: float
    real_tokens: tuple[int, ...]
    """Of each step, as this arm was really shown them."""
    labelled_tokens: tuple[int, ...]
    memory: Memory
    required_flops: int | None
    executed_flops: int | None
    trainable_parameters: int
    model_identity: str
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Applied:
    """A base with the method applied to it by peftbench's own code, so that all arms train the same model."""

    method: Method
    base: LoadedModel
    model: nn.Module

    def cost(self) -> FlopCost | None:
        """Its products, None where they are not known."""
        try:
            return count_flops(
                self.model,
                self.base.model,
                virtual_tokens=self.method.virtual_tokens,
                gradient_checkpointing=False,
                computes_all_logits=False,  # of what is required it changes nothing, and all else is counted
            )
        except UnsupportedFlopsError:
            return None

    @property
    def trainable_parameters(self) -> int:
        """How many scalars are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def method_of(job: Job) -> Method:
    """The case's method, with the benchmark's knobs."""
    found: Method = TypeAdapter(AnyMethod).validate_python(method_knobs(job.case, job.spec))
    return found


def applied(job: Job, *, flattens: bool) -> Applied:
    """The peers' model: Hugging Face's own modules, where peftbench's arm has its fused GELU (2.4e-7 off)."""
    from accelerate.utils import set_seed

    base = load_model(
        Model(
            path=job.base,
            dropout=job.spec.dropout,
            fused_gelu=False,
            attention="flash_attention_2" if flattens else "sdpa",
        )
    )
    set_seed(job.spec.seed)  # where peftbench has it too: new weights depend on the seed alone
    method = method_of(job)
    model = method.apply(base.model, base.tokenizer)
    method.set_training(model)
    return Applied(method, base, model)
