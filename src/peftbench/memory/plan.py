"""Results of estimate and fit: predicted memory by phase and category, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from peftbench.timing.prediction import StepTime

Verdict = Literal["fits", "does not fit", "too close to say"]


class _FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PhasePeak(_FrozenModel):
    """Peak memory of one phase of a run: forward, backward, optimizer, evaluate, generate.

    DeepSpeed steps within its backward call; backward and optimizer are one phase there.
    """

    live_bytes: int
    """Sizes of the live tensors."""
    allocated_bytes: int
    """Bytes that the allocator gives out for them: rounded up, and with remainders that it does not split off."""
    live_bytes_by_category: dict[str, int]
    operation: str
    """The operation at which the peak occurred."""


class RowLimit(_FrozenModel):
    """The longest rows that are predicted to fit a budget."""

    tokens: int
    """The largest ``data.max_length`` that was found to fit."""
    is_model_limit: bool
    """True if the model has no positions for longer rows."""


class Plan(_FrozenModel):
    """Predicted memory of a recipe on one device, for rank 0."""

    name: str
    engine: str
    num_processes: int = 1
    device_name: str
    calibrated: bool
    """True if context and workspaces were measured on such a device."""
    micro_batch_size: int
    """Rows of a micro-batch."""
    sequence_length: int
    """Real tokens of the longest row; virtual tokens are added."""
    gradient_accumulation_steps: int
    evaluation_batch_size: int
    """Rows of an evaluation batch."""
    step_flops: int | None
    """FLOPs of one optimizer step of one process, with all rows of that length; None if unknown."""
    phase_peaks: dict[str, PhasePeak]
    peak_phase: str
    reserved_bytes: int
    """Bytes that the allocator reserves from the driver."""
    cuda_context_bytes: tuple[int, int]
    """Bytes of the driver's context and of loaded kernels: minimum and maximum."""
    workspace_bytes: tuple[int, int]
    """Bytes of workspaces of cuBLAS and similar libraries: minimum and maximum."""
    process_bytes: tuple[int, int]
    """Bytes of the process, the sum of these three: minimum and maximum. On CPU without Python and its libraries."""
    resident_bytes: tuple[int, int] | None
    """On CPU: resident memory of the process with Python, libraries and freed blocks that the C library keeps."""
    budget_bytes: int | None
    verdict: Verdict | None
    margin_bytes: tuple[int, int] | None
    """Budget minus the process's bytes (negative if it does not fit): minimum and maximum."""
    step_time: StepTime | None = None
    """Predicted time of an optimizer step; None if the device's speed is unknown."""
    suggestion: str | None = None
    """If the run does not fit: the cheapest change that is predicted to fit, or that there is none."""
    longest_rows: RowLimit | None = None
    """The longest rows that fit the budget at this micro-batch; None without a budget, or if no tried length fits."""
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> PhasePeak:
        """The peak of the phase with the most allocated bytes."""
        return self.phase_peaks[self.peak_phase]


class UnplannedRun(_FrozenModel):
    """A run of a suite without an estimate, and the reason."""

    name: str
    reason: str


class Strategy(_FrozenModel):
    """A set of memory-saving techniques and the largest micro-batch that fits with it."""

    techniques: tuple[str, ...]
    overrides: tuple[str, ...]
    """Overrides of recipe keys, in command-line form."""
    tradeoffs: tuple[str, ...]
    """Possible change of results."""
    numerics_changes: tuple[int, ...]
    """Change of the arithmetic by each technique (``Technique.numerics_change``), largest first."""
    plan: Plan
    step_seconds: float | None
    """Predicted seconds of a step, for ratios: the geometric mean of the range. Without a predicted range, at the
    device's peak FLOP/s by its data sheet. None if unknown."""

    @property
    def name(self) -> str:
        """The name shown in tables."""
        return " + ".join(self.techniques) or "unchanged"


class ModelFit(_FrozenModel):
    """One model of a family and the fastest strategy with which it fits, None if it does not fit."""

    name: str
    parameters: int
    strategy: Strategy | None


class Verification(_FrozenModel):
    """Outcome of runs under the budget that verify the fastest strategy."""

    predicted_micro_batch_size: int
    """The micro-batch size that the search returned."""
    outcome_by_micro_batch_size: dict[int, str]
    """Outcome of each run by micro-batch size, in run order."""
    largest_micro_batch_size: int | None
    """The largest micro-batch size that ran; None if a micro-batch of 1 failed."""


class Fit(_FrozenModel):
    """Strategies that fit the budget, fastest first; or models of a family, largest first."""

    budget_bytes: int
    strategies: tuple[Strategy, ...] = ()
    models: tuple[ModelFit, ...] = ()
    verification: Verification | None = None

    @property
    def has_fit(self) -> bool:
        """True if any strategy or model fits."""
        return bool(self.strategies) or any(model.strategy for model in self.models)


def sort_fastest_first(candidates: Iterable[Strategy]) -> list[Strategy]:
    """Sort by predicted time; of equally fast strategies, the one that changes the arithmetic least comes first.

    The largest change counts first, then the next. After that come larger micro-batches and fewer techniques. Unknown
    times come last.
    """
    strategies = list(candidates)
    costs = get_comparable_costs(strategies)
    order = sorted(
        range(len(strategies)),
        key=lambda i: (
            costs[i] or math.inf,
            [change for change in strategies[i].numerics_changes if change],
            -strategies[i].plan.micro_batch_size,
            len(strategies[i].techniques),
        ),
    )
    return [strategies[i] for i in order]


def get_comparable_costs(strategies: Sequence[Strategy]) -> list[float | None]:
    """Return seconds if all strategies have them, else FLOPs, since the two cannot be compared."""
    if all(strategy.step_seconds is not None for strategy in strategies):
        return [strategy.step_seconds for strategy in strategies]
    return [strategy.plan.step_flops for strategy in strategies]
