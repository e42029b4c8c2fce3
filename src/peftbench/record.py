"""RunRecord: what is kept of a run, and the only thing a report is made from. Needs no torch.

Sizes are bytes and times seconds. What is not known is None, never a guess.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from peftbench.errors import RecordError
from peftbench.files import write_atomically

SCHEMA_VERSION = 1
FILE = "record.json"

OutcomeKind = Literal["ok", "oom", "diverged", "preempted", "failed"]

EXIT_CODES: dict[str, int] = {"ok": 0, "oom": 70, "diverged": 71, "preempted": 72, "failed": 73}
"""Exit code of a run that started, by its outcome."""

FINAL = frozenset({"ok", "oom", "diverged"})
"""Outcomes that are results: a suite does not repeat them."""


class _Kept(BaseModel):
    # JSON has no NaN or infinity; as null they could not be read back where a number must be.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Outcome(_Kept):
    """How a run ended. An out-of-memory is a result too."""

    kind: OutcomeKind
    step: int | None = None
    """Optimizer step (counted from 1) at which it ended, where it did not end well."""
    phase: str | None = None
    part: str | None = None
    """Of the step: forward, backward or optimizer."""
    rank: int | None = None
    """Which process it was, where there are several."""
    requested_bytes: int | None = None
    """What an out-of-memory asked for."""
    held_bytes: int | None = None
    """What was held when that was refused: by torch's allocator on a GPU, of the budget on CPU."""
    needed_bytes: int | None = None
    """What the process is predicted to hold at its peak, at least."""
    suggestion: str | None = None
    """What is predicted to fit instead."""
    snapshot: str | None = None
    """File beside the record with the GPU allocator's state when it refused, for pytorch.org/memory_viz."""
    error: str | None = None


class Interval(_Kept):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class Sample(_Kept):
    """One generated summary."""

    id: str
    article: str
    reference: str
    generated: str


class Quality(_Kept):
    """How good the trained model is on held-out examples."""

    split: str
    examples: int
    loss: float | None = None
    """Mean cross-entropy on summary and end tokens, in nats."""
    perplexity: float | None = None
    rouge: dict[str, Interval] | None = None
    """F-measures (0 to 100) of generated summaries: rouge1, rouge2, rougeL, rougeLsum."""
    teacher_forced_argmax_rouge: dict[str, Interval] | None = None
    """The published study's figure: the reference is shown token by token. Not comparable with ``rouge``."""
    samples: tuple[Sample, ...] = ()


class Tokens(_Kept):
    """Tokens trained on, over all ranks: four kinds that must not be mixed."""

    real: int
    padded: int
    labelled: int
    virtual: int


class Parameters(_Kept):
    """Scalars of the model: all of them once, and the trained ones."""

    total: int
    trainable: int


class Device(_Kept):
    """Where a run happened."""

    kind: str
    name: str
    processes: int
    memory_bytes: int | None = None


class Engine(_Kept):
    """What really ran, compared with the recipe before the first step. micro_batch is None where tokens say it."""

    name: str | None = None
    """single, ddp, zero1 ... fsdp2."""
    kind: str
    """As accelerate names it."""
    model: str | None = None
    """Class that the model came to be of."""
    max_grad_norm: float | None = None
    mixed_precision: str
    optimizer: str
    micro_batch: int | None
    accumulation: int
    threads: int


class Memory(_Kept):
    """Peak bytes of one phase, or of one part of its steps."""

    allocated_bytes: int | None = None
    """In tensors, on the GPU."""
    reserved_bytes: int | None = None
    """Held by torch's allocator for tensors, on the GPU; what earlier phases left in its cache counts."""
    inactive_split_bytes: int | None = None
    """Most bytes in free pieces of split blocks: for tensors that fit, and not to be given back to the GPU."""
    allocation_retries: int | None = None
    """How often the allocator found nothing free, emptied its cache and asked the GPU again."""
    process_bytes: int | None = None
    """Used by this process on the GPU at the end of the phase, by NVML: torch's, and what libraries hold beside."""
    resident_bytes: int | None = None
    """Resident set size of the process."""
    resident_baseline_bytes: int | None = None
    """What of it was resident before anything was loaded."""

    @property
    def fragmentation(self) -> float | None:
        """Share of the reserved peak that tensors never filled at once: fragments, rounding, earlier phases' cache."""
        if self.allocated_bytes is None or not self.reserved_bytes:
            return None
        return 1 - self.allocated_bytes / self.reserved_bytes


class StateBytes(_Kept):
    """What a method must keep from step to step, by the sizes of its tensors, of one rank."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """One for each trained scalar, in the type it is trained in."""
    optimizer: int
    """States, and under ZeRO the copies in float32 that are stepped."""
    offloaded: int = 0
    """Of all three, what lies in the CPU's memory beside a GPU, and is counted in none of them."""
    expected_optimizer: int | None = None
    """The optimizer's bytes in closed form, wherever they lie; None where there is none."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer states on the device."""
        return self.weights + self.gradients + self.optimizer


class Breakdown(_Kept):
    """Who held the memory when most of it was held, in one step outside of all other figures."""

    step: int
    rows: int
    """Of each micro-batch, at most."""
    width: int
    """Positions of the widest micro-batch, virtual tokens not counted."""
    peak_bytes: int
    """Most bytes in storages at once."""
    bytes_by_kind: dict[str, int]
    """At the peak: weights, gathered_weights, weight_copies, gradients, buckets, optimizer_state, activations, logits,
    temporaries; of the first process.
    """
    operation: str
    """Whose result made it the peak."""
    part: str | None
    """Of the step: forward, backward or optimizer; under DeepSpeed the last two are one."""


class CountedStep(_Kept):
    """FLOPs of one real step, over all ranks: counted as torch dispatched them, and in closed form."""

    step: int
    counted: int
    closed_form: int | None
    """None where the model computes something of unknown cost."""


class TokensPerSecond(_Kept):
    """The four kinds of tokens, per second, over all ranks."""

    real: float
    padded: float
    labelled: float
    virtual: float


class Throughput(_Kept):
    """Speed of the timed steps, those after warm-up."""

    steps: int
    step_seconds_median: float
    step_seconds_p10: float
    step_seconds_p90: float
    samples_per_second: float
    tokens_per_second: TokensPerSecond
    data_share: float
    """Part of the time that went to making batches and not to steps."""


class Flops(_Kept):
    """Floating-point operations of all training steps and ranks: three numbers that must not share a column."""

    required: int | None = None
    """What the method's mathematics needs: real tokens, causal pairs, the head at labels, nothing computed twice."""
    executed: int | None = None
    """What was computed: padding, all pairs, the head everywhere, and what is computed twice."""
    six_n: int | None = None
    """The convention: six for each parameter outside the embeddings and token, padding included, frozen or not."""
    counted_step: CountedStep | None = None
    """The check of ``executed`` on a warm-up step; None where there was none."""


class Compute(_Kept):
    """FLOP/s of the timed steps and of what they ran on, over all ranks."""

    required_per_second: float | None = None
    executed_per_second: float | None = None
    peak_per_second: float | None = None
    """By the maker's data sheet at the precision used; None for a device that is not in the table."""
    achievable_per_second: float | None = None
    """Of a large matrix product, measured on every rank at once when the run ended."""

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: required, of the peak (Chowdhery et al. 2022, appendix B)."""
        return _share(self.required_per_second, self.peak_per_second)

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilisation: executed, of the peak."""
        return _share(self.executed_per_second, self.peak_per_second)

    @property
    def of_achievable(self) -> float | None:
        """Required, of what a matrix product achieves."""
        return _share(self.required_per_second, self.achievable_per_second)


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole


class RunRecord(_Kept):
    """Everything kept of one run."""

    schema_version: Literal[1] = 1
    name: str
    started_at: str
    """ISO 8601, UTC."""
    recipe: dict[str, Any]
    recipe_fingerprint: str
    outcome: Outcome
    device: Device
    versions: dict[str, str]
    git: str | None = None
    """Commit of the checkout that ran, with "+changes" where it had any."""
    engine: Engine | None = None
    parameters: Parameters | None = None
    model_identity: str | None = None
    data_identity: str | None = None
    examples: dict[str, int] = {}
    """Examples used, by split."""
    dropped: dict[str, int] = {}
    """Examples left out because their summary left no room for an article, by split."""
    tokens: Tokens | None = None
    steps: int = 0
    skipped_steps: int = 0
    """Steps among them that fp16's loss scaler took back, because a gradient overflowed."""
    losses: tuple[float, ...] = ()
    """Training loss of each step: mean over the labelled tokens of the whole global batch, in nats."""
    step_seconds: tuple[float, ...] = ()
    """Of every step, the warm-up's too."""
    warmup_steps: int = 0
    """How many of the first steps are in no figure."""
    resumed_after: tuple[int, ...] = ()
    """Steps after which another process went on from a checkpoint; its first ones are in no figure either."""
    phase_seconds: dict[str, float] = {}
    throughput: Throughput | None = None
    memory: dict[str, Memory] = {}
    """By phase; the most over ranks, or, where the run did not end well, of the main one and one out of memory."""
    memory_by_rank: tuple[dict[str, Memory], ...] = ()
    """Each rank's own, until the end of evaluation."""
    step_memory_by_rank: tuple[dict[str, Memory], ...] = ()
    step_memory: dict[str, Memory] = {}
    """By part of the timed steps (of the warm-up's where there are none), where they can be told apart."""
    part_seconds: dict[str, float] = {}
    """By part, median over warm-up steps but the first and those that were inspected; the device was waited for."""
    timed_steps: tuple[int, ...] = ()
    """Which steps those were, counted from 1."""
    context_bytes: int | None = None
    """What the process took of the GPU before it held the model, by NVML; with several, what they talk through too."""
    state_bytes: StateBytes | None = None
    """The most over ranks."""
    state_bytes_by_rank: tuple[StateBytes, ...] = ()
    breakdown: Breakdown | None = None
    flops: Flops = Flops()
    compute: Compute = Compute()
    energy_joules: float | None = None
    """Of the training phase: of all GPUs (NVML), or of the processors (RAPL) where it ran on them."""
    quality: Quality | None = None
    notes: tuple[str, ...] = ()
    """What was used instead of what was asked for, and what else a reader must know."""

    def write(self, folder: Path) -> Path:
        """Write to ``folder``/record.json, whole or not at all, and return the path."""
        path = folder / FILE
        write_atomically(path, self.model_dump_json(indent=2) + "\n")
        return path

    def priced(self, price_per_hour: float) -> RunRecord:
        """The same with another price of a device's hour."""
        profile = self.recipe.get("profile", {}) | {"price_per_hour": price_per_hour}
        return self.model_copy(update={"recipe": self.recipe | {"profile": profile}})

    @property
    def joules_per_1000_samples(self) -> float | None:
        """Energy of the training phase, by the samples of its steps."""
        if self.energy_joules is None or self.throughput is None:
            return None
        return 1000 * self.energy_joules / (self.throughput.steps * int(self.recipe["train"]["global_batch"]))

    @property
    def training_price(self) -> float | None:
        """Of the training phase on all devices, in the currency of the recipe's ``profile.price_per_hour``."""
        hourly, seconds = self.recipe.get("profile", {}).get("price_per_hour"), self.train_seconds
        devices = self.device.processes if self.device.kind == "cuda" else 1  # processes on CPU share it
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
    if memory.resident_bytes is None or memory.resident_baseline_bytes is None:
        return None
    return memory.resident_bytes - memory.resident_baseline_bytes


def read_record(path: Path) -> RunRecord:
    """Read one record.

    Raises:
        RecordError: the file is not a record of this schema.
    """
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RecordError(f"{path} is not a record of schema {SCHEMA_VERSION}: {where}: {first['msg']}") from error
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error


def read_records(folder: Path) -> list[RunRecord]:
    """All records below ``folder``, by path.

    Raises:
        RecordError: there are none.
    """
    records = [read_record(path) for path in sorted(folder.rglob(FILE))]
    if not records:
        raise RecordError(f"no {FILE} below {folder}; give the folder that a run or a suite wrote to")
    return records
