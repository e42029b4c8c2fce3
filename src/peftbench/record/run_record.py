"""RunRecord: everything written about one run, and how records are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from peftbench.common.filesystem import write_atomically
from peftbench.common.schema import RecordModel
from peftbench.common.validation_errors import describe_requirement
from peftbench.errors import RecordError
from peftbench.record.held_out_curve import Forgetting, HeldOutCurve
from peftbench.record.measurements import (
    Compute,
    Device,
    Engine,
    Flops,
    Memory,
    MemoryBreakdown,
    ParameterCounts,
    SavedModel,
    SplitOverlap,
    StateBytes,
    Throughput,
    Tokens,
)
from peftbench.record.quality import Quality
from peftbench.record.recorded_plan import RecordedPlan
from peftbench.record.upgrade import upgrade_record

SCHEMA_VERSION = 3
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
"""Recipe keys that every comparison needs."""

OutcomeKind = Literal["ok", "oom", "diverged", "preempted", "failed"]

EXIT_CODES: dict[str, int] = {"ok": 0, "oom": 70, "diverged": 71, "preempted": 72, "failed": 73}
"""Exit code of a run that started, by its outcome."""

FINAL_OUTCOMES = frozenset({"ok", "oom", "diverged"})
"""Outcomes that are results: a suite does not repeat them."""


class Outcome(RecordModel):
    """Outcome of a run. Running out of memory is a result too."""

    kind: OutcomeKind
    step: int | None = None
    """Optimizer step (counted from 1) at which a run that failed ended."""
    phase: str | None = None
    step_part: str | None = None
    """Part of that step: forward, backward or optimizer."""
    rank: int | None = None
    """Rank that ran out of memory, in a distributed run."""
    requested_bytes: int | None = None
    """Size of the allocation that failed."""
    in_use_bytes: int | None = None
    """Bytes in use when it failed: allocated by torch on a GPU, counted against the budget on CPU."""
    estimated_peak_bytes: int | None = None
    """Predicted peak of the process, a lower bound."""
    suggestion: str | None = None
    """Settings predicted to fit."""
    suggested_overrides: tuple[str, ...] = ()
    """Those settings as overrides of recipe keys."""
    memory_snapshot: str | None = None
    """File next to the record with the state of the CUDA allocator at the failure, for pytorch.org/memory_viz."""
    error: str | None = None


class RunRecord(RecordModel):
    """Everything written about one run."""

    schema_version: Literal[3] = 3
    name: str
    started_at: str
    """ISO 8601, UTC."""
    evaluated_at: str | None = None
    """ISO 8601, UTC: start of a later process that evaluated the saved model; None if the training process did."""
    recipe: dict[str, Any]
    recipe_fingerprint: str
    outcome: Outcome
    device: Device
    library_versions: dict[str, str]
    git_commit: str | None = None
    """Git commit of the source tree, with "+changes" if it had uncommitted changes."""
    engine: Engine | None = None
    parameters: ParameterCounts | None = None
    model_fingerprint: str | None = None
    model_config_fingerprint: str | None = None
    """Hash of a local base model's config.json, without keys that change no number; None if unknown."""
    data_fingerprint: str | None = None
    num_examples: dict[str, int] = Field(default={})
    """Examples used, by split."""
    num_dropped_examples: dict[str, int] = Field(default={})
    """Examples dropped because they do not fit even when they are cut, by split."""
    num_cut_examples: dict[str, int] = Field(default={})
    """Examples that are cut to the length of a sequence, by split."""
    num_cut_labels: dict[str, int] = Field(default={})
    """Labeled tokens that are cut, by split."""
    num_control_token_examples: dict[str, int] = Field(default={})
    """Examples with text that the tokenizer can only encode as a control token, by split."""
    split_overlap: SplitOverlap | None = None
    """Evaluated examples that are also training examples; None if nothing was trained."""
    tokens: Tokens | None = None
    steps: int = 0
    skipped_steps: int = 0
    """Steps that the fp16 loss scaler skipped after a gradient overflow; included in ``steps``."""
    step_losses: tuple[float, ...] = ()
    """Training loss of each step: mean over the labeled tokens of the whole global batch, in nats."""
    step_tokens: tuple[int, ...] = ()
    """Real tokens of each step, over all ranks."""
    step_seconds: tuple[float, ...] = ()
    """Duration of every step, untimed ones included."""
    untimed_steps: int = 0
    """Number of first steps excluded from time, throughput and memory."""
    stopped_early: bool = False
    """True if early stopping ended the training after ``steps``, before its last step."""
    held_out_curve: HeldOutCurve | None = None
    """Evaluations during training; None without ``evaluate.interval``."""
    forgetting: Forgetting | None = None
    """Loss on a general text; None without ``evaluate.general_text``."""
    resumed_after: tuple[int, ...] = ()
    """Steps after which the run was resumed; the first steps after each are untimed too."""
    phase_seconds: dict[str, float] = Field(default={})
    throughput: Throughput | None = None
    memory: dict[str, Memory] = Field(default={})
    """Peak by phase, maximum over ranks; of a failed run, over the main rank and the one that ran out of memory."""
    memory_by_rank: tuple[dict[str, Memory], ...] = ()
    """Peak by phase of each rank, until the end of evaluation."""
    step_memory_by_rank: tuple[dict[str, Memory], ...] = ()
    step_memory: dict[str, Memory] = Field(default={})
    """Peak by part of the timed steps (of the untimed steps if no step is timed), where the device can measure it."""
    step_part_seconds: dict[str, float] = Field(default={})
    """Median seconds by part, over untimed steps except the first and instrumented ones; the device is synchronized."""
    part_timed_steps: tuple[int, ...] = ()
    """Steps in that median, counted from 1."""
    cuda_context_bytes: int | None = None
    """GPU memory of the process before the model was loaded (NVML), communication buffers included."""
    state_bytes: StateBytes | None = None
    """Maximum over ranks."""
    state_bytes_by_rank: tuple[StateBytes, ...] = ()
    memory_breakdown: MemoryBreakdown | None = None
    plan: RecordedPlan | None = None
    """Predicted memory; None if the run did not train to its end, or if no plan was requested."""
    flops: Flops = Flops()
    compute: Compute = Compute()
    energy_joules: float | None = None
    """Energy of the training phase: all GPUs (NVML), or the CPU packages (RAPL) in a run on CPU."""
    saved_model: SavedModel | None = None
    """None if no model was saved."""
    quality: Quality | None = None
    notes: tuple[str, ...] = ()
    """Substitutions and other facts that a reader needs."""

    def write(self, run_dir: Path) -> Path:
        """Write ``run_dir``/record.json atomically and return its path."""
        path = run_dir / RECORD_FILE
        write_atomically(path, self.model_dump_json(indent=2) + "\n")
        return path

    def with_price_per_hour(self, price_per_hour: float) -> RunRecord:
        """Return a copy with another price of a device hour."""
        profile = self.recipe.get("profile", {}) | {"price_per_hour": price_per_hour}
        return self.model_copy(update={"recipe": self.recipe | {"profile": profile}})

    @property
    def joules_per_1000_samples(self) -> float | None:
        """Energy of the training phase per 1,000 training samples."""
        if self.energy_joules is None or self.throughput is None:
            return None
        return 1000 * self.energy_joules / (self.throughput.steps * int(self.recipe["train"]["global_batch_size"]))

    @property
    def training_cost(self) -> float | None:
        """Cost of the training phase on all devices, in the currency of ``profile.price_per_hour``."""
        hourly, seconds = self.recipe.get("profile", {}).get("price_per_hour"), self.train_seconds
        devices = self.device.num_processes if self.device.type == "cuda" else 1  # processes on a CPU share it
        return None if hourly is None or seconds is None else hourly * devices * seconds / 3600

    @property
    def train_seconds(self) -> float | None:
        """Seconds of the training phase, without untimed steps."""
        return self.phase_seconds.get("train")

    @property
    def startup_seconds(self) -> float | None:
        """Seconds before the first step: loading, encoding, building, and computing initial values."""
        if not self.step_losses:
            return None
        return sum(self.phase_seconds.get(phase, 0.0) for phase in ("load", "build", "initialize"))


def train_peak_bytes(record: RunRecord) -> int | None:
    """Return the peak of the training phase: tensors on a GPU; on CPU the RSS above its value before loading."""
    memory = record.memory.get("train")
    if memory is None and record.outcome.kind == "oom":  # its peak before the failure
        memory = record.memory.get("warmup")
    if memory is None or memory.allocated_bytes is not None:
        return memory.allocated_bytes if memory else None
    if memory.rss_bytes is None or memory.baseline_rss_bytes is None:
        return None
    return memory.rss_bytes - memory.baseline_rss_bytes


def read_record(path: Path) -> RunRecord:
    """Read one record; one of an earlier schema is upgraded.

    Raises:
        RecordError: the file is not a record, or its recipe lacks a key that every comparison needs.
    """
    try:
        record = RunRecord.model_validate_json(_upgrade(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecordError(f"{path} is not a record of schema {SCHEMA_VERSION}: {_describe(first)}") from error
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    for key in REQUIRED_KEYS:
        section, name = key.split(".")
        values = record.recipe.get(section)
        if not isinstance(values, dict) or name not in values:
            raise RecordError(f"{path} is not a record: its recipe has no {key}")
    return record


def _describe(error: Mapping[str, Any]) -> str:
    """Return what is wrong with a file, from one of pydantic's errors."""
    location = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] == "json_invalid":
        return "the file is not valid JSON"
    if error["type"] == "extra_forbidden":
        return f"{location} is not a field of a record"
    return f"{location} must be {describe_requirement(error)}"


def read_schema_version(path: Path) -> int | None:
    """Return the schema version that a record was written with; None if the file is missing or not a record."""
    try:
        version = json.loads(path.read_bytes())["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None


def _upgrade(content: bytes) -> bytes:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):  # pydantic names the place
        return content
    if not isinstance(values, dict) or values.get("schema_version") == SCHEMA_VERSION:
        return content
    with suppress(KeyError, TypeError, AttributeError, ValueError):  # pydantic names the first field that differs
        return json.dumps(upgrade_record(values)).encode()
    return content


@dataclass(frozen=True)
class RecordScan:
    """The records below a folder."""

    records: dict[Path, RunRecord]
    """Records by the path of their file, sorted by path."""
    unreadable: dict[Path, str]
    """Sentences with path and reason, by the path of each file that is not a readable record."""


def scan_records(root: Path, *, allow_empty: bool = False) -> RecordScan:
    """Read all records below ``root``; those that cannot be read do not hide the others.

    Raises:
        RecordError: there is no readable record and ``allow_empty`` is False.
    """
    records, unreadable = {}, {}
    for path in sorted(root.rglob(RECORD_FILE)):
        try:
            records[path] = read_record(path)
        except RecordError as error:
            unreadable[path] = str(error)
    if records or allow_empty:
        return RecordScan(records, unreadable)
    if not unreadable:
        raise RecordError(f"No {RECORD_FILE} below {root}; give the output folder of a run or a suite")
    first, num_others = next(iter(unreadable.values())), len(unreadable) - 1
    others = f" (and {num_others} more)" if num_others else ""
    raise RecordError(f"no readable {RECORD_FILE} below {root}: {first}{others}", "run the recipe again")


def read_records(root: Path) -> list[RunRecord]:
    """Read all records below ``root``, sorted by path.

    Raises:
        RecordError: no record exists, or one cannot be read.
    """
    records = find_records(root)
    if not records:
        raise RecordError(f"No {RECORD_FILE} below {root}; give the output folder of a run or a suite")
    return list(records.values())


def find_records(root: Path) -> dict[Path, RunRecord]:
    """Read all records below ``root``, keyed and sorted by path; empty if no record exists.

    Raises:
        RecordError: one cannot be read.
    """
    return {path: read_record(path) for path in sorted(root.rglob(RECORD_FILE))}
