"""The record of one arm's measurement. Needs no torch. Sizes are in bytes, times in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from spec import Spec

from peftbench.errors import RecordError
from peftbench.record import Memory

_RENAMED: dict[str | None, dict[str, str]] = {
    None: {
        "data_identity": "data_fingerprint",
        "model_identity": "model_fingerprint",
        "required_flops": "model_flops",
        "executed_flops": "hardware_flops",
        "warmup_steps": "untimed_steps",
    },
    "spec": {"soft_tokens": "num_virtual_tokens"},
    "memory": {
        "resident_bytes": "rss_bytes",
        "resident_baseline_bytes": "baseline_rss_bytes",
        "allocation_retries": "num_alloc_retries",
    },
}
"""Section (None: the top level) of a record of schema 1: old key: new key."""


def _rename_keys(values: dict[str, Any], section: str | None) -> dict[str, Any]:
    return {_RENAMED[section].get(key, key): value for key, value in values.items()}


class Measured(BaseModel):
    """One measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: Literal[2] = 2
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
    data_fingerprint: str
    model_fingerprint: str
    trainable_parameters: int
    untimed_steps: int
    """Number of first steps, excluded from time and memory."""
    losses: tuple[float, ...]
    """Mean over the labels of the global batch, per step, in nats."""
    step_seconds: tuple[float, ...]
    """From the end of the previous step to the end of each timed step."""
    train_seconds: float
    """From the end of the untimed steps to the end of the last step, synchronized at both."""
    real_tokens: tuple[int, ...]
    """Per step."""
    labeled_tokens: tuple[int, ...]
    """Per step."""
    memory: Memory
    """Peak memory of the timed steps."""
    counted_step: int
    """Step, counted from 1, whose FLOPs were counted."""
    model_flops: int | None
    hardware_flops: int | None

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, values: object) -> object:
        """Rename the keys of a record of schema 1."""
        if not isinstance(values, dict) or values.get("schema_version") != 1:
            return values
        record = _rename_keys(values, None) | {"schema_version": 2}
        return record | {
            name: _rename_keys(record[name], name) for name in ("spec", "memory") if isinstance(record.get(name), dict)
        }

    @property
    def tokens_per_second(self) -> float:
        """Return real tokens of the timed steps per second, including the time between steps."""
        return sum(self.real_tokens[self.untimed_steps :]) / self.train_seconds

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
