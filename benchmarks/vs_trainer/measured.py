"""The record of one arm's measurement. Needs no torch. Sizes are in bytes, times in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from spec import Spec

from peftbench.errors import RecordError
from peftbench.record import Memory

_OLD_MEMORY_KEYS = {
    "resident_bytes": "rss_bytes",
    "resident_baseline_bytes": "baseline_rss_bytes",
    "allocation_retries": "num_alloc_retries",
}


class Measured(BaseModel):
    """One measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: Literal[1] = 1
    case: str
    arm: str
    repeat: int
    spec: Spec
    settings: dict[str, Any]
    """This arm's settings beyond the shared ones; for peftbench the recipe without paths."""
    notes: tuple[str, ...] = ()
    started_at: str
    """ISO 8601, UTC."""
    device_kind: str
    device_name: str
    threads: int
    versions: dict[str, str]
    git: str | None
    """Commit of the checkout, with "+changes" if it was modified."""
    data_identity: str
    model_identity: str
    trainable_parameters: int
    warmup_steps: int
    """Number of first steps that are excluded from time and memory."""
    losses: tuple[float, ...]
    """Mean over the labels of the global batch, per step, in nats."""
    step_seconds: tuple[float, ...]
    """From the end of the previous step to the end of each timed step."""
    train_seconds: float
    """From the end of warm-up to the end of the last step, synchronized at both."""
    real_tokens: tuple[int, ...]
    """Per step."""
    labeled_tokens: tuple[int, ...]
    """Per step."""
    memory: Memory
    """Peak memory of the timed steps."""
    counted_step: int
    """Step, counted from 1, whose FLOPs were counted."""
    required_flops: int | None
    executed_flops: int | None

    @field_validator("memory", mode="before")
    @classmethod
    def _upgrade_memory(cls, values: object) -> object:
        """Rename the keys of records from before 2026-11-29."""
        return (
            {_OLD_MEMORY_KEYS.get(key, key): value for key, value in values.items()}
            if isinstance(values, dict)
            else values
        )

    @property
    def tokens_per_second(self) -> float:
        """Return real tokens of the timed steps per second, including the time between steps."""
        return sum(self.real_tokens[self.warmup_steps :]) / self.train_seconds

    @property
    def peak_bytes(self) -> int | None:
        """Return allocated memory on a GPU; on CPU the increase of RSS over the state before loading."""
        memory = self.memory
        if memory.allocated_bytes is not None:
            return memory.allocated_bytes
        if memory.rss_bytes is None or memory.baseline_rss_bytes is None:
            return None
        return memory.rss_bytes - memory.baseline_rss_bytes


def read_measured(folder: Path) -> list[Measured]:
    """Read all records in ``folder``, sorted by path.

    Raises:
        RecordError: the folder has no records, or a file is invalid.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            found.append(Measured.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise RecordError(f"{path} is not a record of this benchmark: {where}: {first['msg']}") from error
    if not found:
        raise RecordError(f"{folder} has no records; pass the folder that --out named")
    return found
