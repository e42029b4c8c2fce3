"""The record of one arm's measurement. Needs no torch. Sizes are bytes and times seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from spec import Spec

from peftbench.errors import RecordError
from peftbench.record import Memory


class Measured(BaseModel):
    """Everything kept of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: Literal[1] = 1
    case: str
    arm: str
    repeat: int
    spec: Spec
    settings: dict[str, Any]
    """What this arm was told beyond what all share; peftbench's whole recipe without its paths."""
    notes: tuple[str, ...] = ()
    started_at: str
    """ISO 8601, UTC."""
    device_kind: str
    device_name: str
    threads: int
    versions: dict[str, str]
    git: str | None
    """Commit of the checkout that ran, with "+changes" where it had any."""
    data_identity: str
    model_identity: str
    trainable_parameters: int
    warmup_steps: int
    """How many of the first steps are in no figure."""
    losses: tuple[float, ...]
    """Of each step: mean over the labelled tokens of the whole global batch, in nats."""
    step_seconds: tuple[float, ...]
    """From the end of the step before to the end of each timed one."""
    train_seconds: float
    """From the end of the last warm-up step to the end of the last one, the device waited for at both."""
    real_tokens: tuple[int, ...]
    """Of each step."""
    labelled_tokens: tuple[int, ...]
    """Of each step."""
    memory: Memory
    """Peaks of the timed steps."""
    counted_step: int
    """Step, counted from 1, whose FLOPs these are."""
    required_flops: int | None
    executed_flops: int | None

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of the timed steps by their time, everything between two steps included."""
        return sum(self.real_tokens[self.warmup_steps :]) / self.train_seconds

    @property
    def peak_bytes(self) -> int | None:
        """In tensors on a GPU; on CPU resident beyond what was before anything was loaded."""
        memory = self.memory
        if memory.allocated_bytes is not None:
            return memory.allocated_bytes
        if memory.rss_bytes is None or memory.baseline_rss_bytes is None:
            return None
        return memory.rss_bytes - memory.baseline_rss_bytes


def read_measured(folder: Path) -> list[Measured]:
    """All records below ``folder``, by path.

    Raises:
        RecordError: there are none, or a file is none.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            found.append(Measured.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise RecordError(f"{path} is no record of this benchmark: {where}: {first['msg']}") from error
    if not found:
        raise RecordError(f"there are no records below {folder}; give the folder that --out named")
    return found
