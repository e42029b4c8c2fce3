"""The answer before a run: what it would hold, by part and by kind, and whether that fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["fits", "does not fit", "too close to say"]


class _FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PhasePeak(_FrozenModel):
    """The peak of one part of a run: forward, backward, optimizer, evaluate, generate.

    Under DeepSpeed, which steps in the backward pass, that and the optimizer are one.
    """

    live_bytes: int
    """Sizes of the tensors that are there."""
    allocated_bytes: int
    """What torch's allocator gives for them."""
    live_bytes_by_category: dict[str, int]
    operation: str
    """Whose result made it the peak."""


class Plan(_FrozenModel):
    """What a recipe would hold on one device of a kind, in the first of its processes."""

    name: str
    engine: str
    num_processes: int = 1
    device_name: str
    calibrated: bool
    """Whether what only the device knows was measured on one."""
    micro_batch_size: int
    """Of a micro-batch."""
    sequence_length: int
    """Real tokens of its longest row; virtual ones come on top."""
    gradient_accumulation_steps: int
    evaluation_batch_size: int
    """Examples at once in evaluation."""
    step_flops: int | None
    """Of one optimizer step of one process, over rows that are all as long as that; None where not known."""
    phase_peaks: dict[str, PhasePeak]
    peak_phase: str
    reserved_bytes: int
    """What the allocator takes from the driver."""
    cuda_context_bytes: tuple[int, int]
    """Of the driver and of kernels that are loaded: at least and at most."""
    workspace_bytes: tuple[int, int]
    """Of cuBLAS and its kin, at least and at most."""
    process_bytes: tuple[int, int]
    """Of all three, at least and at most."""
    budget_bytes: int | None
    verdict: Verdict | None
    margin_bytes: tuple[int, int] | None
    """What would be left of the budget (negative: what is missing), at least and at most."""
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> PhasePeak:
        """The part that holds most."""
        return self.phase_peaks[self.peak_phase]


class UnplannedRun(_FrozenModel):
    """A run of a suite that is not predicted, and why."""

    name: str
    reason: str


class Strategy(_FrozenModel):
    """Ways of saving memory and the largest micro-batch that fit together."""

    techniques: tuple[str, ...]
    overrides: tuple[str, ...]
    """To the recipe, as on a command line."""
    tradeoffs: tuple[str, ...]
    """What is another computation with them."""
    plan: Plan
    step_seconds: float | None
    """Of a step at the device's peak FLOP/s by its data sheet; good for ratios. None where not known."""

    @property
    def name(self) -> str:
        """For a table."""
        return " + ".join(self.techniques) or "as it is"


class ModelFit(_FrozenModel):
    """One model of a family, and the fastest way in which it fits; none where it does not."""

    name: str
    parameters: int
    strategy: Strategy | None


class Verification(_FrozenModel):
    """What runs under the budget have shown of the first answer."""

    predicted_micro_batch_size: int
    """The micro-batch that the search found."""
    outcome_by_micro_batch_size: dict[int, str]
    """How each run ended, by its micro-batch, in the order in which they were run."""
    largest_micro_batch_size: int | None
    """The largest micro-batch that ran; None where not even one example did."""


class Fit(_FrozenModel):
    """What fits: strategies, the fastest first; or models of a family, the largest first."""

    budget_bytes: int
    strategies: tuple[Strategy, ...] = ()
    models: tuple[ModelFit, ...] = ()
    verification: Verification | None = None

    @property
    def has_fit(self) -> bool:
        """Whether anything does."""
        return bool(self.strategies) or any(model.strategy for model in self.models)


def sort_fastest_first(candidates: Iterable[Strategy]) -> list[Strategy]:
    """By predicted time, then the larger micro-batch, then the fewer techniques; the last are those of unknown time."""
    strategies = list(candidates)
    taken = get_comparable_costs(strategies)
    order = sorted(
        range(len(strategies)),
        key=lambda i: (taken[i] or math.inf, -strategies[i].plan.micro_batch_size, len(strategies[i].techniques)),
    )
    return [strategies[i] for i in order]


def get_comparable_costs(strategies: Sequence[Strategy]) -> list[float | None]:
    """What each takes: seconds where all have them, else FLOPs, for one is not compared with the other."""
    if all(strategy.step_seconds is not None for strategy in strategies):
        return [strategy.step_seconds for strategy in strategies]
    return [strategy.plan.step_flops for strategy in strategies]
