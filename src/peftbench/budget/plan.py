"""The answer before a run: what it would hold, by part and by kind, and whether that fits."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError

from peftbench.errors import BudgetError

Verdict = Literal["fits", "does not fit", "too close to say"]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Answer):
    """The peak of one part of a run: forward, backward, optimizer, evaluate, generate.

    Under DeepSpeed, which steps in the backward pass, that and the optimizer are one.
    """

    live_bytes: int
    """Sizes of the tensors that are there."""
    allocated_bytes: int
    """What torch's allocator gives for them."""
    live_by_kind: dict[str, int]
    operation: str
    """Whose result made it the peak."""


class Plan(_Answer):
    """What a recipe would hold on one device of a kind, in the first of its processes."""

    name: str
    engine: str
    processes: int = 1
    device: str
    calibrated: bool
    """Whether what only the device knows was measured on one."""
    rows: int
    """Of a micro-batch."""
    width: int
    """Real tokens of its longest row; virtual ones come on top."""
    micro_batches: int
    step_flops: int | None
    """Of one optimizer step of one process, over rows that are all as long as that; None where not known."""
    parts: dict[str, Part]
    peak_part: str
    reserved_bytes: int
    """What the allocator takes from the driver."""
    process_bytes: tuple[int, int]
    """With context and workspaces: at least and at most."""
    budget_bytes: int | None
    verdict: Verdict | None
    margin_bytes: tuple[int, int] | None
    """What would be left of the budget (negative: what is missing), at least and at most."""
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> Part:
        """The part that holds most."""
        return self.parts[self.peak_part]


class Strategy(_Answer):
    """Ways of saving memory and the largest micro-batch that fit together."""

    techniques: tuple[str, ...]
    changes: tuple[str, ...]
    """To the recipe, as on a command line."""
    trades: tuple[str, ...]
    """What is another computation with them."""
    plan: Plan
    seconds: float | None
    """Of a step at the device's peak FLOP/s by its data sheet; good for ratios. None where not known."""

    @property
    def name(self) -> str:
        """For a table."""
        return " + ".join(self.techniques) or "as it is"


class _Size(BaseModel):
    size: ByteSize


def parse_size(text: str) -> int:
    """Bytes of "16GiB", "16GB" (10^9), "15.5 GiB" or a plain number of bytes.

    Raises:
        BudgetError: it is no size.
    """
    try:
        size = int(_Size(size=text).size)  # type: ignore[arg-type]
    except ValidationError as error:
        raise BudgetError(f"{text!r} is no size of memory; write it as 16GiB or 15500MiB") from error
    if size <= 0:
        raise BudgetError(f"a budget of {text!r} leaves no memory at all; write it as 16GiB or 15500MiB")
    return size
