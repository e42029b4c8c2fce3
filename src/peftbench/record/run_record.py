"""How a run ended, and all that is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from peftbench.common.filesystem import write_atomically
from peftbench.common.schema import RecordModel
from peftbench.errors import RecordError
from peftbench.record.measurements import (
    Compute,
    Device,
    Engine,
    Flops,
    Memory,
    MemoryBreakdown,
    ParameterCounts,
    StateBytes,
    Throughput,
    Tokens,
)
from peftbench.record.quality import Quality

SCHEMA_VERSION = 1
RECORD_FILE = "record.json"

REQUIRED_KEYS = (
    "method.kind",
    "train.seed",
    "data.seed",
    "train.global_batch_size",
    "train.precision",
    "data.max_length",
    "data.label_padding",
)
"""Knobs that every recipe has, and without which a run can be compared with none."""

OutcomeKind = Literal["ok", "oom", "diverged", "preempted", "failed"]

EXIT_CODES: dict[str, int] = {"ok": 0, "oom": 70, "diverged": 71, "preempted": 72, "failed": 73}
"""Exit code of a run that started, by its outcome."""

FINAL_OUTCOMES = frozenset({"ok", "oom", "diverged"})
"""Outcomes that are results: a suite does not repeat them."""


class Outcome(RecordModel):
    """How a run ended. An out-of-memory is a result too."""

    kind: OutcomeKind
    step: int | None = None
    """Optimizer step (counted from 1) at which it ended, where it did not end well."""
    phase: str | None = None
    step_part: str | None = None
    """Of the step: forward, backward or optimizer."""
    rank: int | None = None
    """Which process it was, where there are several."""
    requested_bytes: int | None = None
    """What an out-of-memory asked for."""
    in_use_bytes: int | None = None
    """What was held when that was refused: by torch's allocator on a GPU, of the budget on CPU."""
    estimated_peak_bytes: int | None = None
    """What the process is predicted to hold at its peak, at least."""
    suggestion: str | None = None
    """What is predicted to fit instead."""
    memory_snapshot: str | None = None
    """File beside the record with the GPU allocator's state when it refused, for pytorch.org/memory_viz."""
    error: str | None = None


class RunRecord(RecordModel):
    """Everything kept of one run."""

    schema_version: Literal[1] = 1
    name: str
    started_at: str
    """ISO 8601, UTC."""
    recipe: dict[str, Any]
    recipe_fingerprint: str
    outcome: Outcome
    device: Device
    library_versions: dict[str, str]
    git_commit: str | None = None
    """Commit of the checkout that ran, with "+changes" where it had any."""
    engine: Engine | None = None
    parameters: ParameterCounts | None = None
    model_fingerprint: str | None = None
    data_fingerprint: str | None = None
    num_examples: dict[str, int] = Field(default={})
    """Examples used, by split."""
    num_dropped_examples: dict[str, int] = Field(default={})
    """Examples left out because their summary left no room for an article, by split."""
    tokens: Tokens | None = None
    steps: int = 0
    skipped_steps: int = 0
    """Steps among them that fp16's loss scaler took back, because a gradient overflowed."""
    step_losses: tuple[float, ...] = ()
    """Training loss of each step: mean over the labelled tokens of the whole global batch, in nats."""
    step_tokens: tuple[int, ...] = ()
    """Real tokens of each step, over all ranks."""
    step_seconds: tuple[float, ...] = ()
    """Of every step, the warm-up's too."""
    untimed_steps: int = 0
    """How many of the first steps are in no figure."""
    resumed_after: tuple[int, ...] = ()
    """Steps after which another process went on from a checkpoint; its first ones are in no figure either."""
    phase_seconds: dict[str, float] = Field(default={})
    throughput: Throughput | None = None
    memory: dict[str, Memory] = Field(default={})
    """By phase; the most over ranks, or, where the run did not end well, of the main one and one out of memory."""
    memory_by_rank: tuple[dict[str, Memory], ...] = ()
    """Each rank's own, until the end of evaluation."""
    step_memory_by_rank: tuple[dict[str, Memory], ...] = ()
    step_memory: dict[str, Memory] = Field(default={})
    """By part of the timed steps (of the warm-up's where there are none), where they can be told apart."""
    step_part_seconds: dict[str, float] = Field(default={})
    """By part, median over warm-up steps but the first and those that were inspected; the device was waited for."""
    part_timed_steps: tuple[int, ...] = ()
    """Which steps those were, counted from 1."""
    cuda_context_bytes: int | None = None
    """What the process took of the GPU before it held the model, by NVML; with several, what they talk through too."""
    state_bytes: StateBytes | None = None
    """The most over ranks."""
    state_bytes_by_rank: tuple[StateBytes, ...] = ()
    memory_breakdown: MemoryBreakdown | None = None
    flops: Flops = Flops()
    compute: Compute = Compute()
    energy_joules: float | None = None
    """Of the training phase: of all GPUs (NVML), or of the processors (RAPL) where it ran on them."""
    quality: Quality | None = None
    notes: tuple[str, ...] = ()
    """What was used instead of what was asked for, and what else a reader must know."""

    def write(self, run_dir: Path) -> Path:
        """Write to ``folder``/record.json, whole or not at all, and return the path."""
        path = run_dir / RECORD_FILE
        write_atomically(path, self.model_dump_json(indent=2) + "\n")
        return path

    def with_price_per_hour(self, price_per_hour: float) -> RunRecord:
        """The same with another price of a device's hour."""
        profile = self.recipe.get("profile", {}) | {"price_per_hour": price_per_hour}
        return self.model_copy(update={"recipe": self.recipe | {"profile": profile}})

    @property
    def joules_per_1000_samples(self) -> float | None:
        """Energy of the training phase, by the samples of its steps."""
        if self.energy_joules is None or self.throughput is None:
            return None
        return 1000 * self.energy_joules / (self.throughput.steps * int(self.recipe["train"]["global_batch_size"]))

    @property
    def training_cost(self) -> float | None:
        """Of the training phase on all devices, in the currency of the recipe's ``profile.price_per_hour``."""
        hourly, seconds = self.recipe.get("profile", {}).get("price_per_hour"), self.train_seconds
        devices = self.device.num_processes if self.device.type == "cuda" else 1  # processes on CPU share it
        return None if hourly is None or seconds is None else hourly * devices * seconds / 3600

    @property
    def train_seconds(self) -> float | None:
        """Seconds of the training phase alone, warm-up steps left out."""
        return self.phase_seconds.get("train")


def train_peak_bytes(record: RunRecord) -> int | None:
    """Peak of the training phase: in tensors on a GPU; on CPU resident beyond what was before anything was loaded."""
    memory = record.memory.get("train")
    if memory is None and record.outcome.kind == "oom":  # what it reached before it was refused more
        memory = record.memory.get("warmup")
    if memory is None or memory.allocated_bytes is not None:
        return memory.allocated_bytes if memory else None
    if memory.rss_bytes is None or memory.baseline_rss_bytes is None:
        return None
    return memory.rss_bytes - memory.baseline_rss_bytes


def read_record(path: Path) -> RunRecord:
    """Read one record.

    Raises:
        RecordError: the file is not a record of this schema, or its recipe is another program's.
    """
    try:
        record = RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RecordError(f"{path} is not a record of schema {SCHEMA_VERSION}: {where}: {first['msg']}") from error
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    for knob in REQUIRED_KEYS:
        part, name = knob.split(".")
        inside = record.recipe.get(part)
        if not isinstance(inside, dict) or name not in inside:
            raise RecordError(f"{path} is not a record: its recipe has no {knob}")
    return record


def read_records(root: Path) -> list[RunRecord]:
    """All records below ``folder``, by path.

    Raises:
        RecordError: there are none, or one cannot be read.
    """
    return list(read_records_by_path(root).values())


def read_records_by_path(root: Path) -> dict[Path, RunRecord]:
    """All records below ``folder`` by their files, in the order of those.

    Raises:
        RecordError: there are none, or one cannot be read.
    """
    records = find_records(root)
    if not records:
        raise RecordError(f"no {RECORD_FILE} below {root}; give the folder that a run or a suite wrote to")
    return records


def find_records(root: Path) -> dict[Path, RunRecord]:
    """All records below ``folder`` by their files, in the order of those; empty where there are none.

    Raises:
        RecordError: one cannot be read.
    """
    return {path: read_record(path) for path in sorted(root.rglob(RECORD_FILE))}
