"""Results of ``peftbench fit MODEL``: for each method whether it fits, and how large its inputs may be."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from peftbench.memory.plan import Plan, Verdict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MicroBatchLimit(_Answer):
    """The largest micro-batch at one row length."""

    length: int
    """Tokens of each row."""
    rows: int
    """Rows of the largest micro-batch that surely fits; 0 if a single row does not."""
    is_largest_tried: bool
    """True if no larger micro-batch was tried."""


class Speed(_Answer):
    """Tokens per second, and time and price of a number of examples: minimum and maximum of each."""

    tokens_per_second: tuple[float, float]
    hours: tuple[float, float]
    price: tuple[float, float] | None
    """Price of these hours, None if no price per hour is known."""
    basis: str
    """Source of the numbers, as a clause."""


class MethodFit(_Answer):
    """One method: its verdict at a micro-batch of one row, and the largest sizes that surely fit."""

    name: str
    title: str
    """Name for a table."""
    overrides: tuple[str, ...]
    """Overrides of recipe keys that make this row, in command-line form."""
    engine: str | None = None
    """Engine that is planned; None if there is no plan."""
    precision: str | None = None
    """Precision of arithmetic; None if there is no plan."""
    verdict: Verdict | None = None
    """Verdict for one row of the reference length; None if there is no plan."""
    plan: Plan | None = None
    """Plan of one row of the reference length."""
    reason: str | None = None
    """Reason for which there is no plan."""
    micro_batches: tuple[MicroBatchLimit, ...] = ()
    longest_context: int | None = None
    """Tokens of the longest single row that surely fits; None if no length that was tried fits."""
    host_bytes: int | None = None
    """Bytes of CPU memory that offloaded weights, gradients and optimizer states of one process take; None without
    offload, or for a method that freezes weights."""
    speed: Speed | None = None
    change: str | None = None
    """The cheapest change that would make it fit, or that there is none; None if it fits."""
    num_plans: int = 0
    """Number of sizes that were planned for this row."""

    @property
    def fits(self) -> bool:
        """True if the method surely fits."""
        return self.verdict == "fits"


class FitAnswer(_Answer):
    """All methods on one device."""

    model: str
    parameters: int
    """Parameters of the model; a tied head is counted once."""
    device_name: str
    budget_bytes: int
    reference_length: int
    """Tokens of a row to which verdict, peak and speed apply."""
    max_positions: int | None
    """Positions of the model, None if its config has no limit."""
    column_lengths: tuple[int, ...]
    """Row lengths for which the largest micro-batch was searched."""
    num_examples: int
    """Examples whose hours and price are given."""
    tokens_per_example: float
    methods: tuple[MethodFit, ...]
    notes: tuple[str, ...] = ()
    exit_code: int
    """0 if at least one method surely fits, else 1."""

    @property
    def has_fit(self) -> bool:
        """True if at least one method surely fits."""
        return any(method.fits for method in self.methods)
